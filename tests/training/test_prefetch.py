"""Views made during the step: the same bits, in order, and made here once that is seen to be sooner."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastssl.augment.backend import backend_of
from fastssl.bench.parts import parts
from fastssl.data.batch import Batch
from fastssl.recipe.load import load
from fastssl.training import prefetch

CPU = torch.device("cpu")


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbered(count: int) -> Iterator[Batch]:
    return (Batch(torch.zeros(0), torch.zeros(0), torch.tensor([i])) for i in range(count))


@pytest.mark.usefixtures("_two_threads")
def test_views_made_beside_the_step_have_the_same_bits(tiny_recipe: dict[str, Any]):
    made = parts(load(tiny_recipe))
    found = made.trained_on()
    for batch, epoch in (pair for _, pair in zip(range(12), made.batches(), strict=False)):  # over two epochs' ends
        groups, expected = next(found), made.views(batch, epoch)  # the background thread is at work meanwhile
        assert all(torch.equal(a, b) for a, b in zip(groups, expected, strict=True))


def names_of_threads(views_s: float, step_s: float, count: int) -> list[str]:
    names = []

    def views(batch: Batch) -> Any:
        time.sleep(views_s)
        names.append(threading.current_thread().name)
        return (batch.index_B,)

    seen = []
    for (index_B,) in prefetch.prefetch_views(numbered(count), views, CPU, backend=backend_of("cpu")):
        seen.append(int(index_B))
        time.sleep(step_s)
    assert seen == list(range(count))
    return names


@pytest.mark.usefixtures("_two_threads")
def test_short_work_stays_in_the_background_and_long_work_comes_back():
    here = threading.current_thread().name
    assert here not in names_of_threads(0.05, 0.1, 20)  # the wait is a hand-over, far below half of the work
    names = names_of_threads(0.02, 0.0, 20)  # every step waits for all of its views
    assert names.index(here) == prefetch.TRIAL_STEPS + 1
    assert set(names[prefetch.TRIAL_STEPS + 1 :]) == {here}


@pytest.mark.usefixtures("_two_threads")
def test_a_failure_in_the_background_is_the_callers_and_everything_is_closed():
    closed = []

    def batches() -> Iterator[Batch]:
        try:
            yield from numbered(5)
        finally:
            closed.append(True)

    def views(batch: Batch) -> Any:
        if int(batch.index_B) == 2:
            raise ValueError("a bad picture")
        return (batch.index_B,)

    found = prefetch.prefetch_views(batches(), views, CPU, backend=backend_of("cpu"))
    assert [int(next(found)[0]), int(next(found)[0])] == [0, 1]
    with pytest.raises(ValueError, match="a bad picture"):
        next(found)
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl-prefetch")]


def test_one_thread_stays_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert set(names_of_threads(0.0, 0.0, 4)) == {threading.current_thread().name}
