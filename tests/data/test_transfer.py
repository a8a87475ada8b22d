"""Two CUDA streams without CUDA: who waits for what, seen on stand-ins that write down every call."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastssl.augment.backend import backend_of
from fastssl.data.batch import Batch
from fastssl.data.loaders import transfer
from fastssl.training.prefetch import prefetch_views

CUDA = torch.device("cuda", 0)


class Streams:
    """`torch.cuda`'s streams as names; `calls` has what each was asked for, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.events = 0
        self.now = Stream("current", self)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("side", self))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        patch.setattr(torch.cuda, "stream", self.entered)

    @contextlib.contextmanager
    def entered(self, stream: "Stream") -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Stream:
    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self.streams = name, streams

    def wait_stream(self, other: "Stream") -> None:
        self.streams.calls.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event: str) -> None:
        self.streams.calls.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.streams.events += 1
        return f"item {self.streams.events}"


class View:
    """Stands for a tensor of views."""

    def __init__(self, number: int, streams: Streams) -> None:
        self.number, self.streams = number, streams
        streams.calls.append(f"{streams.now.name} makes {number}")

    def record_stream(self, stream: Stream) -> None:
        self.streams.calls.append(f"{self.number} is kept for {stream.name}")


def test_the_side_stream_waits_for_the_filling_store_and_the_step_for_its_own_views_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch)
    batches = (Batch(torch.zeros(0), torch.zeros(0), torch.tensor([i])) for i in (1, 2, 3))

    def make_views(batch: Batch) -> Any:
        return (View(int(batch.index_B), streams),)

    steps = prefetch_views(batches, make_views, CUDA, backend=backend_of("torch"))
    (first,) = next(steps)
    assert first.number == 1  # type: ignore[comparison-overlap]
    assert streams.calls == [
        "side waits for all of current",  # which may still fill the resident store
        "side makes 1",
        "current waits for item 1",
        "1 is kept for current",
        "side makes 2",  # before the step of 1 is launched
    ]
    assert [views[0].number for views in steps] == [2, 3]  # type: ignore[attr-defined]
    assert "current waits for all of side" not in streams.calls


def test_copies_to_cuda_leave_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory a copy waits for the device, whatever it was asked."""
    copied: list[tuple[bool, bool]] = []

    class Host(torch.Tensor):
        pinned = False

        def is_pinned(self, device: Any = None) -> bool:
            return self.pinned

        def pin_memory(self, device: Any = None) -> "Host":
            found = self.clone().as_subclass(Host)
            found.pinned = True
            return found

        def to(self, *args: Any, non_blocking: bool = False, **more: Any) -> "Host":
            copied.append((self.pinned, non_blocking))
            return self

    index_B = torch.arange(3).as_subclass(Host)
    transfer.moved(Batch(index_B.pin_memory(), index_B, index_B, index_B, None), CUDA)
    assert copied == [(True, True)] * 4
