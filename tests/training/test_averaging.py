"""Averaged weights: their closed form, an exact resume, and that evaluation, loading and exports take them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import one_torch_thread, tiny

import fastssl
from fastssl.errors import UserError
from fastssl.pretrained.export.export import export
from fastssl.runs import checkpoint
from fastssl.training import state
from fastssl.training.averaging import Average
from fastssl.training.loop import train

DECAY = 0.8


@pytest.fixture(scope="module")
def averaged(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    with one_torch_thread():
        train(tiny((tiny_data[0], None), optim={"ema": DECAY}, train={"keep_checkpoints": 20}), run_dir=folder)
    return folder


def test_the_average_has_its_closed_form(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """Over three steps, running statistics of batch norm included; the counters are the network's own."""
    recipe = tiny((tiny_data[0], None), optim={"ema": DECAY}, train={"epochs": 1, "checkpoint_every_steps": 1})
    train(recipe | {"train": recipe["train"] | {"keep_checkpoints": 9}}, run_dir=tmp_path)
    steps = [checkpoint.read(checkpoint.path_of(tmp_path / "checkpoints", step)) for step in (1, 2, 3)]
    average = steps[-1].average
    assert average is not None
    shares = (DECAY**2, DECAY * (1 - DECAY), 1 - DECAY)
    for name, tensor in average.items():
        values = [step.weights[name] for step in steps]
        if tensor.is_floating_point():
            expected = sum(share * value.double() for share, value in zip(shares, values, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(tensor, values[-1])
    assert any("running_var" in name for name in average)


def test_the_average_begins_with_the_first_step_taken(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """The scaler of fp16 begins too high and leaves steps out: the initial weights would have the largest share."""
    changes = {"precision": "fp16", "checkpoint_every_steps": 1, "keep_checkpoints": 20}
    train(tiny((tiny_data[0], None), optim={"ema": DECAY}, train=changes), run_dir=tmp_path)
    found = [checkpoint.read(checkpoint.path_of(tmp_path / "checkpoints", step)) for step in range(1, 11)]
    names = [name for name in found[0].weights if name.endswith("conv1.weight")]
    taken = [any(not torch.equal(a.weights[n], b.weights[n]) for n in names) for a, b in itertools.pairwise(found)]
    assert not taken[0]
    first = taken.index(True) + 1  # place of the first step that moved the weights
    assert all(step.state["averaged_steps"] == max(0, place - first + 1) for place, step in enumerate(found))
    average = found[first].average
    assert average is not None
    for name, tensor in found[first].weights.items():
        assert torch.equal(average[name], tensor)


def test_a_resume_is_exact(averaged: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    class Pulled(Exception):  # noqa: N818
        pass

    def pull(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            raise Pulled

    recipe = tiny((tiny_data[0], None), optim={"ema": DECAY}, train={"keep_checkpoints": 20})
    with one_torch_thread():
        with pytest.raises(Pulled):
            train(recipe, run_dir=tmp_path / "run", observe=pull)
        train(recipe, run_dir=tmp_path / "run", resume=True)
    ours, theirs = (checkpoint.latest(run / "checkpoints", warn=pytest.fail) for run in (tmp_path / "run", averaged))
    assert ours is not None
    assert theirs is not None
    assert ours.average is not None
    assert theirs.average is not None
    assert ours.state["averaged_steps"] == theirs.state["averaged_steps"] == 10
    for name in theirs.average:
        assert torch.equal(ours.average[name], theirs.average[name])
        assert torch.equal(ours.weights[name], theirs.weights[name])


def test_training_itself_does_not_change(averaged: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    with one_torch_thread():
        train(tiny((tiny_data[0], None)), run_dir=tmp_path)
    raw = checkpoint.load_weights(averaged, "raw")
    plain = checkpoint.load_weights(tmp_path)
    assert all(torch.equal(raw[name], tensor) for name, tensor in plain.items())
    with pytest.raises(UserError, match="no averaged weights"):
        fastssl.load(tmp_path, weights="ema")


def test_evaluation_takes_the_average(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: list[Average] = []

    class Seen(Average):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            averages.append(self)

    seen: list[torch.nn.Module] = []
    for name in ("while_training", "at_the_end"):
        method = getattr(state.Prober, name)

        def spy(self: Any, backbone: Any, *rest: Any, _method: Any = method, **options: Any) -> Any:
            seen.append(backbone)
            return _method(self, backbone, *rest, **options)

        monkeypatch.setattr(state.Prober, name, spy)
    monkeypatch.setattr(state, "Average", Seen)
    train(tiny(tiny_data, optim={"ema": DECAY}, train={"epochs": 1}), run_dir=tmp_path)
    assert len(seen) == 2
    assert all(backbone is averages[0].network.backbone for backbone in seen)


def test_loading_and_exports_take_the_average_and_say_so(averaged: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    features = {kind: fastssl.load(averaged, weights=kind).embed(images) for kind in ("ema", "raw")}  # type: ignore[arg-type]
    assert np.abs(features["ema"] - features["raw"]).max() > 0
    assert fastssl.load(averaged).weights == "ema"
    with pytest.raises(UserError, match="loaded with weights 'ema'"):
        export(fastssl.load(averaged), tmp_path / "raw.safetensors", to="safetensors", weights="raw")
    np.testing.assert_array_equal(fastssl.load(averaged).embed(images), features["ema"])
    for kind in ("ema", "raw"):
        out = tmp_path / f"{kind}.safetensors"
        record = export(averaged, out, to="safetensors", weights=kind)  # type: ignore[arg-type]
        assert record["weights"] == json.loads((tmp_path / f"{out.name}.json").read_text())["weights"] == kind
        assert bool(record["accuracy"]) == (kind == "ema"), "the average was measured, the raw weights were not"
        np.testing.assert_array_equal(fastssl.load(out).embed(images), features[kind])
    with pytest.raises(UserError, match="one set of weights"):
        fastssl.load(tmp_path / "ema.safetensors", weights="raw")
