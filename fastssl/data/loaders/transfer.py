"""Host batches to the training device: made and copied by a thread, one ahead of the batch in use.

N stored samples, B batch of one rank.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.loaders.threads import WATCHDOG_S, ahead


def delivered(
    batches: Iterator[Batch], labels_N: Tensor | None, device: torch.device, *, limit_s: float = WATCHDOG_S
) -> Iterator[Batch]:
    """The same batches on the device, each made while the one before is in use.

    Labels are filled in from `labels_N`, int64 on the device, unless that is None.

    On CUDA they are made under a stream of their own, so that copies overlap the training step; images should come
    in pinned memory. UserError when one takes over `limit_s` seconds.
    """
    if device.type != "cuda":
        for batch in ahead((moved(batch, device) for batch in batches), limit_s=limit_s):
            yield _labeled(batch, labels_N)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in ahead(_on_stream(batches, device, stream), limit_s=limit_s):
        now = torch.cuda.current_stream(device)
        now.wait_stream(stream)
        for tensor in (batch.images, batch.labels_B, batch.index_B, batch.sizes_B2, batch.offsets_B):
            if tensor is not None:
                tensor.record_stream(now)  # the allocator must not hand it out while this stream reads it
        yield _labeled(batch, labels_N)


def _labeled(batch: Batch, labels_N: Tensor | None) -> Batch:
    return batch if labels_N is None else replace(batch, labels_B=labels_N[batch.index_B])


def _on_stream(batches: Iterator[Batch], device: torch.device, stream: "torch.cuda.Stream") -> Iterator[Batch]:
    with torch.cuda.stream(stream):
        for batch in batches:
            yield moved(batch, device)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; from pinned memory the copy is not waited for."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return Batch(*(move(getattr(batch, field.name)) for field in fields(batch)))  # type: ignore[arg-type]
