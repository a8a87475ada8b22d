"""Decodes the JPEGs of a `.beton` with NVIDIA DALI, on the GPU by nvJPEG or on the CPU, in our order.

The stored bytes go into DALI by external source, so that the order is ours to the sample and any step can be the
first. Raw images need no decoder and do not pass through DALI. On the CPU its pixels equal FFCV's bit for bit.

N stored samples, B batch of one rank, H W height and width in pixels, C channels.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import layout
from .batch import Batch
from .beton import Beton
from .plan import Order, Plan
from .threads import WATCHDOG_S, cpu_count
from .transfer import delivered

try:
    from nvidia import dali
    from nvidia.dali import fn, types
except ImportError as error:
    raise UserError(
        f"DALI cannot be imported: {error}", "Install it with: pip install 'fastssl-vision[dali]'."
    ) from error


class Dali:
    """Loader of a `.beton` that need not fit in memory; `Dali.open` makes one.

    Attributes:
        labels: int64 (N,) of the whole file, on the device.
        image_shape: (H, W, C), or None when sizes differ; a batch then is flat, with sizes and offsets.
    """

    def __init__(self, beton: Beton, plan: Plan, device: torch.device, *, threads: int, limit_s: float) -> None:
        self.plan, self.device, self._beton = plan, device, beton
        self._threads, self._limit_s = threads, limit_s
        self.labels = torch.from_numpy(beton.labels).to(device)
        self.image_shape = layout.image_shape(beton)
        self._is_jpeg_N = beton.extents[0] == 0
        self._idle: list[Any] = []  # pipelines that no epoch is using

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: torch.device | str,
        batch_size: int,
        order: Order,
        indices: Tensor | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        limit_s: float = WATCHDOG_S,
    ) -> Self:
        """Open a file; arguments as for `Resident.open`, and `limit_s`: longest wait for one batch in seconds."""
        beton = Beton(path)
        plan = Plan.make(
            len(beton),
            batch_size=batch_size,
            order=order,
            indices=indices,
            drop_last=drop_last,
            rank=rank,
            world=world,
        )
        return cls(beton, plan, torch.device(device), threads=threads or cpu_count(), limit_s=limit_s)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.plan)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `start_step` on."""
        return self._batches(self.plan, epoch, start_step)

    def all(self) -> Iterator[Batch]:
        """Every chosen sample once, first to last, the last batch as short as it comes."""
        return self._batches(self.plan.in_order(), 0, 0)

    def _batches(self, plan: Plan, epoch: int, start_step: int) -> Iterator[Batch]:
        index_M = plan.epoch(epoch)
        parts = (index_M[part] for part in plan.slices(start_step))
        yield from delivered(self._decoded(parts), self.labels, self.device, limit_s=self._limit_s)

    def _decoded(self, parts: Iterator[Tensor]) -> Iterator[Batch]:
        """Batches without labels; a pipeline is taken for the epoch and given back at its end."""
        pipeline = self._idle.pop() if self._idle else self._build()
        for index_B in parts:
            try:
                batch = self._decode(pipeline, index_B)
            except RuntimeError as error:  # DALI's pipeline is lost then
                raise self._reason(index_B, error) from error
            yield batch
        self._idle.append(pipeline)

    def _build(self) -> Any:
        on_gpu = self.device.type == "cuda"
        # one batch in flight: the thread that waits for it is already one ahead of the training step
        pipeline = dali.Pipeline(
            batch_size=max(1, self.plan.batch_size // self.plan.world),
            num_threads=self._threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(
                fn.decoders.image(
                    encoded,
                    device="mixed" if on_gpu else "cpu",
                    output_type=types.RGB,
                    adjust_orientation=False,
                    use_fast_idct=True,
                )
            )
        pipeline.build()
        return pipeline

    def _decode(self, pipeline: Any, index_B: Tensor) -> Batch:
        index = index_B.numpy()
        sizes_B2, is_jpeg_B = self._beton.sizes[index], self._is_jpeg_N[index]
        if is_jpeg_B.all() and len(index):
            flat = self._jpegs(pipeline, index, sizes_B2)
        else:
            flat = self._mixed(pipeline, index, sizes_B2, is_jpeg_B)
        return layout.as_batch(flat, index_B, sizes_B2, self._beton.channels, self.image_shape)

    def _jpegs(self, pipeline: Any, index: np.ndarray, sizes_B2: np.ndarray) -> Tensor:
        """Decode these samples, packed one after another on the device."""
        pipeline.feed_input("encoded", [np.frombuffer(self._beton.encoded(i)[1], np.uint8) for i in index])
        pipeline.schedule_run()
        (images,) = pipeline.share_outputs()
        try:
            shapes = np.array(images.shape(), np.int64)
            if (shapes != np.column_stack([sizes_B2, np.full(len(index), 3)])).any():
                raise RuntimeError("sizes differ from the file's records")
            flat = layout.empty(int(shapes.prod(axis=1).sum()), self._beton.dtype, device=self.device)
            address = ctypes.c_void_p(flat.data_ptr())
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device).cuda_stream
                images.copy_to_external(address, stream)
            else:
                images.copy_to_external(address)
        finally:
            pipeline.release_outputs()
        return flat

    def _mixed(self, pipeline: Any, index: np.ndarray, sizes_B2: np.ndarray, is_jpeg_B: np.ndarray) -> Tensor:
        """Raw images copied from the file, JPEGs decoded and put between them."""
        ends = layout.ends_of(sizes_B2, self._beton.channels)
        flat = layout.empty(int(ends[-1]), self._beton.dtype, pin=self.device.type == "cuda")
        target = flat.numpy()
        for k in np.flatnonzero(~is_jpeg_B):
            target[ends[k] : ends[k + 1]] = self._beton.image(int(index[k])).reshape(-1)
        if not is_jpeg_B.any():
            return flat
        flat = flat.to(self.device, non_blocking=True)
        decoded, start = self._jpegs(pipeline, index[is_jpeg_B], sizes_B2[is_jpeg_B]), 0
        for k in np.flatnonzero(is_jpeg_B):
            length = int(ends[k + 1] - ends[k])
            flat[ends[k] : ends[k + 1]] = decoded[start : start + length]
            start += length
        return flat

    def _reason(self, index_B: Tensor, error: RuntimeError) -> UserError:
        """The UserError for a batch that DALI refused: it names the sample where our decoder refuses it as well."""
        for i in index_B.tolist():
            try:
                self._beton.image(i)
            except UserError as found:
                return found
        return UserError(f"DALI cannot decode {self._beton.path}: {error}", "Set data.loader to resident.")
