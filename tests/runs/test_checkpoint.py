"""Checkpoints: exact round trips, every kind of damage noticed, whole or not at all, one process at a time."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.errors import UserError
from fastssl.runs import checkpoint, files


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(3):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def saved(folder: Path, step: int = 3) -> Path:
    module, optimizer = trained()
    return checkpoint.save(
        folder,
        step=step,
        weights=checkpoint.snapshot(module),
        optimizer=checkpoint.optimizer_snapshot(optimizer),
        state={"clock": 1.5, "name": "größe"},
    )


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = saved(tmp_path)
    weights, tensors, state, average = checkpoint.read(path)
    assert average is None
    module, optimizer = trained()
    for name, tensor in module.state_dict().items():
        assert torch.equal(weights[name], tensor)
    other = torch.optim.AdamW(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).parameters(), lr=0.01)
    checkpoint.restore_optimizer(other, tensors)
    ours, theirs = other.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for position, values in theirs.items():
        assert {k: v.tolist() for k, v in values.items()} == {k: v.tolist() for k, v in ours[position].items()}
    assert (state["step"], state["clock"], state["name"]) == (3, 1.5, "größe")


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    kernel = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(kernel.parameters(), fused=True)
    kernel(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    tensors = checkpoint.optimizer_snapshot(optimizer)
    checkpoint.restore_optimizer(optimizer, tensors)
    moments = optimizer.state[kernel.weight]["exp_avg"]
    assert moments.stride() == kernel.weight.stride()
    assert torch.equal(moments.contiguous(), tensors["0.exp_avg"])


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    saved(tmp_path, step=1)
    victim = saved(tmp_path, step=2) / file
    data = victim.read_bytes()
    match damage:
        case "truncate":
            victim.write_bytes(data[:-3])
        case "flip":
            middle = len(data) // 2
            victim.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        case "empty":
            victim.write_bytes(b"")
        case "remove":
            victim.unlink()
    warnings: list[str] = []
    found = checkpoint.latest(tmp_path, warn=warnings.append)
    assert found is not None
    assert found[2]["step"] == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]


def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, step=1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_prune_keeps_the_newest_the_protected_and_sweeps_leftovers(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step=step) for step in (1, 2, 3, 4)]
    (tmp_path / ".step-00000009.77.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2, protect=paths[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-00000004"]


def test_what_a_resume_passed_over_is_set_aside_and_displaces_nothing(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step=step)
    (checkpoint.path_of(tmp_path, 3) / "state.json").write_text("{}")
    (tmp_path / "step-00000002-mine").mkdir()  # a person's copy
    for _ in range(2):
        checkpoint.set_aside(tmp_path, after=2)
        assert [path.name for path in checkpoint.existing(tmp_path)] == ["step-00000002", "step-00000001"]
        assert (tmp_path / "damaged-step-00000003" / "state.json").read_text() == "{}"
    saved(tmp_path, step=3)
    checkpoint.set_aside(tmp_path, after=2)  # once more damaged at the same step
    assert (tmp_path / "damaged-step-00000003" / "weights.safetensors").exists()


def test_load_weights_explains_what_it_cannot_read(tmp_path: Path) -> None:
    module, _ = trained()
    path = saved(tmp_path / "run" / "checkpoints")
    for place in (tmp_path / "run", path, path / "weights.safetensors"):
        assert torch.equal(checkpoint.load_weights(place)["0.weight"], module.state_dict()["0.weight"])
    (tmp_path / "foreign.safetensors").write_bytes(b"\x80\x04pickle")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "foreign.safetensors", tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError):
            checkpoint.load_weights(place)


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.ones(2)}
    checkpoint.save(tmp_path, step=1, weights=weights, optimizer=weights, state={})
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    newer = checkpoint.save(tmp_path, step=2, weights=weights, optimizer=weights, state={})
    assert checkpoint.latest(tmp_path, warn=pytest.fail)[2]["step"] == 2
    assert checkpoint.read(checkpoint.path_of(tmp_path, 1))[2]["format"] == checkpoint.FORMAT - 1
    monkeypatch.undo()
    for load in (lambda: checkpoint.latest(tmp_path, warn=pytest.fail), lambda: checkpoint.load_weights(newer)):
        with pytest.raises(UserError, match="format 2"):
            load()
    assert newer.is_dir()
