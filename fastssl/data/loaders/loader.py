"""The loader of a `.beton`: a plan says which samples make a step, a store brings their pixels to the device.

Stores differ in where pixels come from and who decodes them (`resident`, `ffcv`, `dali`); steps, ranks, labels,
subsets and layout are here, once for all.

N stored samples, B batch of one rank, H W height and width in pixels, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self, Unpack

from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.loaders.layout import Layout, image_shape, padded
from fastssl.data.loaders.plan import Plan, PlanOptions


class Store(Protocol):
    """Brings samples of one file to the device.

    `batches` yields one flat or uniform batch for each of `parts`, slices of `index_M` (int64 file positions, on the
    CPU), some of which may be empty; closing it early leaves nothing running.
    """

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class BetonLoader:
    """Batches of a `.beton`; `open_loader` of resident, ffcv and dali makes one.

    Attributes:
        beton: the open file.
        store: brings its samples.
        plan: which of them, in which order.
        labels: int64 (N,) of the whole file, on the device.
        layout: "flat": images of different sizes arrive as one buffer with offsets and sizes; "padded": as one
            (B, H, W, C) with sizes, which on an accelerator waits for the device once a batch. Images of one size
            arrive as (B, H, W, C) either way, unless the store leaves them in place.
    """

    beton: Beton
    store: Store
    plan: Plan
    labels: Tensor
    layout: Layout = "flat"

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C), or None when sizes differ."""
        return image_shape(self.beton)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.plan)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `start_step` on."""
        index_M = self.plan.epoch(epoch)
        parts = [self.plan.part(step) for step in range(start_step, len(self.plan))]
        batches = self.store.batches(index_M, parts, self.labels)
        if self.layout == "flat":
            yield from batches
            return
        for part, batch in zip(parts, batches, strict=True):
            yield padded(batch, self.beton.sizes[index_M[part].numpy()], self.beton.channels)

    def subset(self, **plan: Unpack[PlanOptions]) -> Self:
        """A loader of other images of the same file, by a plan of its own, that shares the store and its memory."""
        return type(self)(self.beton, self.store, Plan.make(len(self.beton), **plan), self.labels, self.layout)
