"""Whole views on worker threads: the same bits on 1, 2 and 4 of them, the network's own gradients and statistics."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_torch_thread, tiny
from torch import Tensor

import fastssl
from fastssl import build
from fastssl.bench.parts import parts
from fastssl.build.muon import Muon
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.runs import checkpoint
from fastssl.training import parallel
from fastssl.training.parallel import close, view_parallel
from fastssl.training.step import Step, step_of
from fastssl.training.view_parallel import ViewParallel

PER_VIEW = ["model.batch_norm=per_view", "augment.views=3"]
GROUPS = {"batch_norm": "per_view", "batch_norm_groups": 2}


def recipe(data: tuple[Path, Path], *, model: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return tiny(
        (data[0], None),
        data={"val_count": 0},  # an evaluation's operators on several threads are slow next to other programs
        model=model or {"batch_norm": "per_view"},
        augment={"views": 3},
        optim={"name": "muon"},  # whose matrices the workers share too
        train={"precision": "bf16", "parallel": "views"} | train,
    )


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def equal(a: Path, b: Path) -> bool:
    ours, theirs = checkpoint.load_weights(a), checkpoint.load_weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def one_worker(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("workers") / "one"
    fastssl.train(recipe(tiny_data, threads=1), run_dir=run)
    return run


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bits_do_not_depend_on_the_number_of_workers(
    workers: int, one_worker: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    summary = fastssl.train(recipe(tiny_data, threads=workers), run_dir=tmp_path)
    assert summary["parallel"] == "views"
    assert losses(tmp_path) == losses(one_worker)
    assert equal(tmp_path, one_worker)


def test_a_resume_on_another_number_of_cores_is_exact(
    one_worker: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    class Pulled(Exception):  # noqa: N818
        pass

    def pull(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            raise Pulled

    with pytest.raises(Pulled):
        fastssl.train(recipe(tiny_data, threads=4), run_dir=tmp_path, observe=pull)
    fastssl.train(recipe(tiny_data, threads=2), run_dir=tmp_path, resume=True)
    assert losses(tmp_path) == losses(one_worker)
    assert equal(tmp_path, one_worker)


def test_groups_of_images_give_more_workers_something_to_do(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    for workers in (1, 4):
        fastssl.train(recipe(tiny_data, model=GROUPS, epochs=1, threads=workers), run_dir=tmp_path / str(workers))
    assert losses(tmp_path / "4") == losses(tmp_path / "1")
    assert equal(tmp_path / "4", tmp_path / "1")


def test_a_group_has_statistics_of_its_own(tiny_recipe: dict[str, Any]) -> None:
    with one_torch_thread():
        network = parts(load(tiny_recipe, [*PER_VIEW, "model.batch_norm_groups=2"])).plain
        views = torch.randn(2, 8, 3, 16, 16)
        _, z_VBD = network((views,))
        _, first_VBD = network.embed_together((views[:1, :4],))
        _, last_VBD = network.embed_together((views[1:, 4:],))
    torch.testing.assert_close(z_VBD[:1, :4], first_VBD)
    torch.testing.assert_close(z_VBD[1:, 4:], last_VBD)


def test_groups_that_cannot_be_are_refused(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.batch_norm_groups 2 needs model\.batch_norm per_view"):
        load(tiny_recipe, ["model.batch_norm_groups=2"])
    with pytest.raises(UserError, match=r"model\.batch_norm_groups 9 leaves fewer than 2 of 16 images"):
        load(tiny_recipe, ["model.batch_norm=per_view", "model.batch_norm_groups=9", "data.batch_size=16"])


@pytest.mark.parametrize(("accumulate_steps", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_gradients_and_statistics_are_those_of_the_network_itself(
    tiny_recipe: dict[str, Any], accumulate_steps: int, groups: int
) -> None:
    settings = [f"optim.accumulate_steps={accumulate_steps}", f"model.batch_norm_groups={groups}"]
    with one_torch_thread():
        made = parts(load(tiny_recipe, [*PER_VIEW, *settings]))
        batch, epoch = next(made.batches())
        views, before = made.views(batch, epoch), made.train_step.statistics()
        found = []
        for step in (made.train_step, view_parallel(made.train_step, made.plain, workers=2)):
            for buffer, value in before:
                buffer.copy_(value)
            for part in step.parts(views):
                step.backward(step.forward(part))
            gradients = [p.grad.clone() for p in made.plain.parameters() if p.grad is not None]
            assert all(p.grad is None or p.grad.stride() == p.stride() for p in made.plain.parameters())
            found.append((gradients, [buffer.clone() for buffer in made.plain.buffers()]))
            step.optimizer.zero_grad(set_to_none=True)
            close(step)
    (gradients, statistics), (others, other_statistics) = found
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other_statistics, statistics, rtol=1e-5, atol=1e-6)


def test_workers_make_muons_updates_until_they_end(tiny_recipe: dict[str, Any]) -> None:
    with one_torch_thread():
        made = parts(load(tiny_recipe, [*PER_VIEW, "optim.name=muon"]))
        optimizer = made.train_step.optimizer
        assert isinstance(optimizer, Muon)
        step = view_parallel(made.train_step, made.plain, workers=2)
        threads: set[str] = set()

        def watched(velocities: list[Tensor]) -> list[Tensor]:
            threads.add(threading.current_thread().name)
            return velocities

        list(optimizer.run_all(watched, [[]] * 20))
        close(step)
        assert {name.rpartition("_")[0] for name in threads} == {"fastssl-view"}
        assert list(optimizer.run_all(watched, [[]])) == [[]]
    assert threading.current_thread().name in threads


def test_statistics_per_view_are_each_views_own(tiny_recipe: dict[str, Any]) -> None:
    with one_torch_thread():
        made = parts(load(tiny_recipe, PER_VIEW))
        views = torch.randn(2, 8, 3, 16, 16)
        _, alone_1BD = made.plain((views[:1],))
        _, z_VBD = made.plain((torch.cat([views[:1], 100 * views[1:]]),))
    torch.testing.assert_close(z_VBD[:1], alone_1BD)


def test_what_views_cannot_share_is_said(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    joint = tiny((tiny_data[0], None), data={"val_count": 0}, train={"epochs": 1})
    fastssl.train(joint, run_dir=tmp_path / "joint", observe=seen.append)
    assert seen[0]["parallel"] == "operators: model.batch_norm is joint"
    joint["train"]["parallel"] = "views"
    with pytest.raises(UserError, match=r"train\.parallel is views, but model\.batch_norm is joint"):
        fastssl.train(joint, run_dir=tmp_path / "views")


@pytest.mark.parametrize(("operators_s", "chosen"), [(1.1, "views"), (0.9, "views"), (0.7, "operators")])
def test_operators_are_chosen_only_where_they_are_clearly_faster(
    operators_s: float, chosen: str, tiny_data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(step: Step, views: tuple[Tensor, ...]) -> float:
        return 1.0 if isinstance(step.network, ViewParallel) else operators_s

    monkeypatch.setattr(parallel, "fastest_s", seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made, cpu = load(recipe(tiny_data, parallel="auto", epochs=1)), torch.device("cpu")
    network = build.model.network(made, in_channels=3, device=cpu)
    step = step_of(made, network, device=cpu, may_compile=False)
    name, reason = parallel.choose(made, step, network, in_channels=3, device=cpu)
    assert name == chosen
    assert ("which is not 1.25 times as fast" in reason) == (operators_s == 0.9)


def test_a_trial_is_written_into_the_run_and_leaves_no_trace(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    trying = recipe(tiny_data, parallel="auto", epochs=1, threads=2)
    summary = fastssl.train(trying, run_dir=tmp_path, observe=seen.append)
    chosen, _, reason = seen[0]["parallel"].partition(": ")
    assert summary["parallel"] == chosen
    assert "ms by views" in reason
    assert "ms by operators" in reason
    state = json.loads(next((tmp_path / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["parallel"] == chosen
    fastssl.train(recipe(tiny_data, parallel=chosen, epochs=1, threads=1), run_dir=tmp_path / "pinned")
    assert losses(tmp_path)[0] == pytest.approx(losses(tmp_path / "pinned")[0], rel=1e-3)
