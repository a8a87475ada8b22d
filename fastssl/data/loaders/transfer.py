"""Host batches to the training device: made and copied by a thread, one ahead of the batch in use.

N stored samples, B batch of one rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.loaders.threads import WATCHDOG_S, prefetch

T = TypeVar("T")


class SideStream:
    """A CUDA stream whose kernels run together with those of the stream that uses what it makes.

    It first waits for what the current stream has been given so far: a resident store may still be filling.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def make(self, call: Callable[[], T]) -> "tuple[T, torch.cuda.Event]":
        """What `call` gives when its kernels are launched here, and the event of their end."""
        with torch.cuda.stream(self.stream):
            return call(), self.stream.record_event()

    def hand_over(self, ready: "torch.cuda.Event", tensors: Iterator[Tensor]) -> None:
        """Has the current stream wait for `ready`, and keeps memory of these tensors until that stream is done too."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)  # not the whole side stream, which is busy with the next item already
        for tensor in tensors:
            tensor.record_stream(current)  # the allocator must not hand it out while this stream reads it


def delivered(
    batches: Iterator[Batch], labels_N: Tensor | None, device: torch.device, *, limit_s: float = WATCHDOG_S
) -> Iterator[Batch]:
    """The same batches on the device, each made while the one before is in use.

    On CUDA they are made under a stream of their own, so that copies overlap the training step; images should come
    in pinned memory.

    Args:
        batches: in host memory.
        labels_N: labels are filled in from these, int64 on the device, unless None.
        device: where the batches arrive.
        limit_s: longest wait for one batch in seconds.

    Raises:
        UserError: when one takes over `limit_s` seconds.
    """
    if device.type != "cuda":
        for batch in prefetch((moved(batch, device) for batch in batches), limit_s=limit_s):
            yield _labeled(batch, labels_N)
        return
    side = SideStream(device)
    for batch, copied in prefetch(_on_stream(batches, side), limit_s=limit_s):
        side.hand_over(copied, _tensors(batch))
        yield _labeled(batch, labels_N)


def _labeled(batch: Batch, labels_N: Tensor | None) -> Batch:
    return batch if labels_N is None else replace(batch, labels_B=labels_N[batch.index_B])


def _on_stream(batches: Iterator[Batch], side: SideStream) -> "Iterator[tuple[Batch, torch.cuda.Event]]":
    def next_moved() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else moved(batch, side.device)

    while True:
        batch, copied = side.make(next_moved)
        if batch is None:
            return
        yield batch, copied


def _tensors(batch: Batch) -> Iterator[Tensor]:
    values = (getattr(batch, field.name) for field in fields(batch))
    return (value for value in values if value is not None)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; on CUDA the copy is not waited for."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else to_device(tensor, device)

    return Batch(*(move(getattr(batch, field.name)) for field in fields(batch)))  # type: ignore[arg-type]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; on CUDA by way of pinned memory, since a copy from pageable memory waits for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
