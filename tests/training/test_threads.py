"""A run's threads: the recipe's, else what the process may use; said in the start record, and given back."""

from pathlib import Path
from typing import Any

import numba
import pytest
import torch

import fastssl
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.runs.machine import Cores
from fastssl.training import threads


def recipe(count: int | str) -> Any:
    return load({"data": {"path": "x.beton"}, "train": {"epochs": 1, "threads": count}})


@pytest.mark.parametrize(
    ("torch_threads", "ranks", "text"),
    [
        (64, 1, "6 threads: 6 of 64 cores by the cgroup's quota"),
        (64, 4, "1 thread: 6 of 64 cores by the cgroup's quota, shared by 4 ranks"),
        (2, 1, "2 threads: 6 of 64 cores by the cgroup's quota, as torch was set"),
    ],
)
def test_auto_is_what_the_process_may_use(
    torch_threads: int, ranks: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: Cores(6, 64, "the cgroup's quota"))
    monkeypatch.setattr(threads.ranks, "local_world", lambda: ranks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    assert threads.choose(recipe("auto")) == (int(text.split()[0]), text)


def test_a_number_is_set_for_torch_and_numba_and_given_back() -> None:
    before = torch.get_num_threads(), numba.get_num_threads()
    with threads.threads(recipe(3)) as reason:
        assert torch.get_num_threads() == 3
        assert numba.get_num_threads() == min(3, numba.config.NUMBA_NUM_THREADS)
        assert reason == "3 threads: train.threads"
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def test_what_reads_a_run_keeps_within_the_quota_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: Cores(2, 64, "the cgroup's quota"))
    torch.set_num_threads(4)
    try:
        with threads.within_cores():
            assert (torch.get_num_threads(), numba.get_num_threads() <= 2) == (2, True)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_the_start_record_says_it_and_a_resume_may_differ(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    short = tiny_recipe | {"train": {**tiny_recipe["train"], "epochs": 1, "threads": 1}}
    fastssl.train(short, run_dir=tmp_path / "run", observe=seen.append)
    assert seen[0]["threads"] == "1 thread: train.threads"
    other = short | {"train": {**short["train"], "threads": 2}}
    fastssl.train(other, run_dir=tmp_path / "run", resume=True)


def test_a_side_of_evaluation_that_the_backbone_refuses_is_found_before_training(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The views are large enough for it, the clean images, at their own 16 px, are not."""
    large = tiny_recipe | {"augment": {"side_px": 96, "views": 2}, "model": {"backbone": "torchvision/inception_v3"}}
    with pytest.raises(UserError, match="refuses 3 x 16 x 16 images") as caught:
        fastssl.train(large, run_dir=tmp_path / "run")
    assert "evaluate.side_px" in caught.value.fix
    assert not (tmp_path / "run").exists()
