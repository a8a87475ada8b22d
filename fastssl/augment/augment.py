"""uint8 images in, normalized views out: draw, turn the draws into parameters, apply them.

B batch, V views, H W height and width, C channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastssl.augment.backend import Backend, Images, Output
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import Parameters, View, constant, runs


class ImageBatch(Protocol):
    """What an augmentation reads of a loader's batch.

    Attributes:
        images: uint8 or uint16 (B, H, W, C), or a flat buffer with `offsets_B` and `sizes_B2`.
        index_B: int64 position of each image in its data set.
        sizes_B2: int64 true (height, width) of padded or flat images; None: all are H x W.
        offsets_B: int64 first element of each image in the flat buffer, or None.
    """

    @property
    def images(self) -> Tensor: ...

    @property
    def index_B(self) -> Tensor: ...

    @property
    def sizes_B2(self) -> Tensor | None: ...

    @property
    def offsets_B(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Augment:
    """Cuts V views from each image of a batch; what sample i gets in epoch e depends on nothing else.

    Attributes:
        views: the policy, one row per view.
        mean_C, std_C: normalization in [0, 1] units of the image's full range, one number per channel.
        seed: of every draw.
        dtype: of the views: float32, bfloat16 or float16.
        backend: from `backend_of`.
    """

    views: tuple[View, ...]
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    seed: int
    dtype: torch.dtype
    backend: Backend

    def __call__(self, batch: ImageBatch, epoch: int | Tensor) -> tuple[Tensor, ...]:
        """Augment a batch.

        Args:
            batch: B images on one device, such as a loader's `Batch`.
            epoch: epoch number, or an int64 scalar on the images' device.

        Returns:
            One views_VBCHW for each run of consecutive rows of equal side_px. `.flatten(0, 1)` of each is
            channels_last.
        """
        images = Images(batch.images, sizes_of(batch), batch.offsets_B)
        output = Output(self.mean_C, self.std_C, self.dtype)
        return tuple(
            self.backend.apply(images, DrawKey(self.seed, epoch, batch.index_B, first), self.views[first:last], output)
            for first, last in runs(tuple(view.side_px for view in self.views))
        )

    def sample_params(self, batch: ImageBatch, epoch: int | Tensor) -> Parameters:
        """What a call with the same arguments applies."""
        key = DrawKey(self.seed, epoch, batch.index_B, first=0)
        return self.backend.sample_params(self.views, key, sizes_of(batch))


def sizes_of(batch: ImageBatch) -> Tensor:
    """int64 (B, 2), height and width in pixels of each image."""
    if batch.sizes_B2 is not None:
        return batch.sizes_B2
    assert batch.images.ndim == 4, "a flat buffer needs sizes_B2 and offsets_B"
    size_2 = constant(tuple(batch.images.shape[1:3]), torch.int64, batch.images.device)
    return size_2.expand(len(batch.images), 2)  # one copy to the device ever, and no kernel
