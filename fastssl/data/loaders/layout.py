"""How the images of a batch or of a whole file lie one after another in a flat buffer.

N stored samples, B batch of one rank, H W height and width in pixels, C channels.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.errors import UserError
from fastssl.runs.machine import free_host_bytes

Layout = Literal["flat", "padded"]
TORCH_TYPES = {"uint8": torch.uint8, "uint16": torch.uint16}


def image_shape(beton: Beton) -> tuple[int, int, int] | None:
    """(H, W, C) of every image, None when they differ."""
    if not beton.is_uniform:
        return None
    return int(beton.sizes[0, 0]), int(beton.sizes[0, 1]), beton.channels


def ends_of(sizes_B2: np.ndarray, channels: int) -> np.ndarray:
    """First element of each image in the flat buffer, then the buffer's length: int64 (B + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes_B2.prod(axis=1) * channels)])


def empty(elements: int, dtype: np.dtype, *, pin: bool = False, device: torch.device | str = "cpu") -> Tensor:
    """A flat buffer for pixels of this numpy type."""
    return torch.empty(elements, dtype=TORCH_TYPES[dtype.name], device=device, pin_memory=pin)


def as_batch(
    flat: Tensor, index_B: Tensor, sizes_B2: np.ndarray, channels: int, shape: tuple[int, int, int] | None
) -> Batch:
    """A batch of the images packed in `flat`, its labels still to be filled in."""
    unlabeled_B = torch.full_like(index_B, -1)
    if shape is not None:
        return Batch(flat.view(-1, *shape), unlabeled_B, index_B)
    offsets_B = torch.from_numpy(ends_of(sizes_B2, channels)[:-1])
    return Batch(flat, unlabeled_B, index_B, torch.from_numpy(sizes_B2), offsets_B)


def padded(batch: Batch, sizes_B2: np.ndarray, channels: int) -> Batch:
    """A flat batch as one (B, H, W, C) of its largest height and width, each image at the top left, zeros around it.

    Args:
        batch: flat, or of one size, which is returned as it is.
        sizes_B2: its sizes on the host, where they are known without waiting for the device.
        channels: C.
    """
    if batch.offsets_B is None:
        return batch
    height, width = sizes_B2.max(axis=0, initial=1).tolist()
    images = batch.images.new_zeros((len(batch), height, width, channels))
    for k, (start, (h, w)) in enumerate(zip(batch.offsets_B.tolist(), sizes_B2.tolist(), strict=True)):
        images[k, :h, :w] = batch.images[start : start + h * w * channels].view(h, w, channels)
    return Batch(images, batch.labels_B, batch.index_B, batch.sizes_B2)


def require_memory(wanted: int, device: torch.device) -> None:
    """UserError before an allocation that cannot succeed (a file's records may state anything)."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_host_bytes()
    if wanted > free:
        raise UserError(
            f"The images would take {wanted / 1e9:.3g} GB and {device.type} has {free / 1e9:.3g} GB free.",
            "Set data.memory to mmap or data.loader to dali, a smaller batch, or a side_px at conversion.",
        )
