"""Decodes the JPEGs of a `.beton` with NVIDIA DALI, on the GPU by nvJPEG or on the CPU, in our order.

The stored bytes go into DALI by external source, so that the order is ours to the sample and any step can be the
first. Raw images need no decoder and do not pass through DALI. On the CPU its pixels equal FFCV's bit for bit.

N stored samples, B batch of one rank, H W height and width in pixels, C channels.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.loaders.layout import Layout, as_batch, empty, ends_of, image_shape
from fastssl.data.loaders.loader import BetonLoader
from fastssl.data.loaders.plan import Plan, PlanOptions
from fastssl.data.loaders.threads import WATCHDOG_S
from fastssl.data.loaders.transfer import delivered
from fastssl.errors import UserError
from fastssl.runs.machine import cores

try:
    from nvidia import dali
    from nvidia.dali import fn, types
except ImportError as error:
    raise UserError(
        f"DALI cannot be imported: {str(error).rstrip('.')}.",
        "Install it with `pip install 'fastssl-vision[dali]'` (for CUDA 12: dali-cuda12).",
    ) from error


def open_loader(
    path: Path,
    *,
    device: torch.device | str,
    threads: int | None = None,
    limit_s: float = WATCHDOG_S,
    layout: Layout = "flat",
    **plan: Unpack[PlanOptions],
) -> BetonLoader:
    """Open a file that need not fit in memory.

    Args:
        path: a `.beton`.
        device: where batches arrive; on CUDA, nvJPEG decodes there.
        threads: that decode; None for one per core.
        limit_s: longest wait for one batch in seconds.
        layout: of images of different sizes, see `BetonLoader`.
        plan: see `PlanOptions`.
    """
    device, beton = torch.device(device), Beton(path)
    steps = Plan.make(len(beton), **plan)
    store = _Store(beton, device, threads or cores().count, limit_s)
    return BetonLoader(beton, store, steps, torch.from_numpy(beton.labels).to(device), layout)


class _Store:
    """Decodes in a pipeline that is taken for an epoch and given back at its end."""

    def __init__(self, beton: Beton, device: torch.device, threads: int, limit_s: float) -> None:
        self._beton, self._device, self._threads, self._limit_s = beton, device, threads, limit_s
        self._shape, self._is_jpeg_N = image_shape(beton), beton.extents[0] == 0
        self._idle: list[tuple[int, Any]] = []  # (largest batch, pipeline) that no epoch is using

    def batches(self, index_M: Tensor, parts: list[slice], labels_N: Tensor) -> Iterator[Batch]:
        wanted = [index_M[part] for part in parts]
        return delivered(self._decoded(wanted), labels_N, self._device, limit_s=self._limit_s)

    def _decoded(self, wanted: list[Tensor]) -> Iterator[Batch]:
        """Batches without labels."""
        most = max((len(index_B) for index_B in wanted), default=0)
        fitting = next((entry for entry in self._idle if entry[0] >= most), None)
        if fitting is not None:
            self._idle.remove(fitting)
        size, pipeline = fitting or (max(1, most), self._build(max(1, most)))
        self._start(pipeline, self._encoded(wanted[0]) if wanted else [])
        for k, index_B in enumerate(wanted):
            try:
                following = self._encoded(wanted[k + 1]) if k + 1 < len(wanted) else []
                images = self._finished(pipeline, index_B)
                self._start(pipeline, following)  # so that DALI's threads do not rest while this batch is taken out
                batch = self._decode(images, index_B)
            except RuntimeError as error:  # DALI's pipeline is lost then
                raise self._reason(torch.cat(wanted[k : k + 2]), error) from error
            yield batch
        self._idle.append((size, pipeline))

    def _build(self, batch_size: int) -> Any:
        # one batch in flight, started as soon as the one before is done: a second would hold as much memory again
        pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=self._threads,
            device_id=device_id(self._device),
            prefetch_queue_depth=1,
            exec_dynamic=True,  # outputs belong to who holds them, also after release_outputs
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(decoded(encoded, self._device))
        pipeline.build()
        return pipeline

    def _encoded(self, index_B: Tensor) -> list[np.ndarray]:
        """The JPEGs among these samples."""
        index = index_B.numpy()
        return [np.frombuffer(self._beton.encoded(i)[1], np.uint8) for i in index[self._is_jpeg_N[index]]]

    def _start(self, pipeline: Any, jpegs: list[np.ndarray]) -> None:
        if jpegs:
            pipeline.feed_input("encoded", jpegs)
            pipeline.schedule_run()

    def _finished(self, pipeline: Any, index_B: Tensor) -> Any:
        """The decoded JPEGs of a batch that has been started; None where there is none. DALI counts who holds them."""
        if not self._is_jpeg_N[index_B.numpy()].any():
            return None
        (images,) = pipeline.share_outputs()
        pipeline.release_outputs()
        return images

    def _decode(self, images: Any, index_B: Tensor) -> Batch:
        """The batch of these samples, whose JPEGs have been decoded."""
        index = index_B.numpy()
        sizes_B2, is_jpeg_B = self._beton.sizes[index], self._is_jpeg_N[index]
        if images is not None:
            expected_B3 = np.column_stack([sizes_B2[is_jpeg_B], np.full(is_jpeg_B.sum(), 3)])
            if (np.array(images.shape(), np.int64) != expected_B3).any():
                raise RuntimeError("sizes differ from the file's records")
        if is_jpeg_B.all() and images is not None:
            flat = packed(images, self._device)
        else:
            flat = self._mixed(images, index, sizes_B2, is_jpeg_B)
        return as_batch(flat, index_B, sizes_B2, self._beton.channels, self._shape)

    def _mixed(self, images: Any, index: np.ndarray, sizes_B2: np.ndarray, is_jpeg_B: np.ndarray) -> Tensor:
        """Raw images copied from the file, decoded JPEGs put between them."""
        ends = ends_of(sizes_B2, self._beton.channels)
        flat = empty(int(ends[-1]), self._beton.dtype, pin=self._device.type == "cuda")
        target = flat.numpy()
        for k in np.flatnonzero(~is_jpeg_B):
            target[ends[k] : ends[k + 1]] = self._beton.image(int(index[k])).reshape(-1)
        if images is None:
            return flat
        flat = flat.to(self._device, non_blocking=True)
        decoded, start = packed(images, self._device), 0
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
            except UserError as refusal:
                return refusal
        return UserError(
            f"DALI cannot decode {self._beton.path}: {str(error).rstrip('.')}.", "Set data.loader to resident."
        )


def device_id(device: torch.device) -> int | None:
    """DALI's number of the device, None for the CPU."""
    return (device.index or 0) if device.type == "cuda" else None


def decoded(encoded: Any, device: torch.device, *, gray: bool = False, upright: bool = False) -> Any:
    """The decoder of a pipeline, within which this is called; `upright` turns images as their EXIF says."""
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.GRAY if gray else types.RGB,
        adjust_orientation=upright,
        use_fast_idct=True,
    )


def packed(images: Any, device: torch.device) -> Tensor:
    """Images that DALI has decoded, one after another on the device, which stay what they are: uint8 (total,)."""
    shapes = np.array(images.shape(), np.int64)
    if device.type == "cpu" and (shapes == shapes[:1]).all():
        dense: Tensor = torch.from_dlpack(images.as_tensor())  # DALI does not use these pages again while we hold them
        return dense.view(-1)
    elements = int(shapes.prod(axis=1).sum())
    flat = empty(elements, np.dtype(np.uint8), device=device)
    address = ctypes.c_void_p(flat.data_ptr())
    if device.type == "cuda":
        images.copy_to_external(address, torch.cuda.current_stream(device).cuda_stream)
    else:
        images.copy_to_external(address)
    return flat
