"""What every loader delivers: one batch of images, still uint8, on the training device.

B batch, H W height and width in pixels, C channels.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one step, each decoded once.

    Images of one size arrive as (B, H, W, C), or as their places in a flat buffer that holds them already: with
    `offsets_B` and `sizes_B2`. Images of different sizes arrive either padded to the largest (B, H, W, C) with
    `sizes_B2`, or as one flat buffer.

    Attributes:
        images: uint8 or uint16, (B, H, W, C), or (total,) when `offsets_B` is given.
        labels_B: int64 class of each image, -1 where there is none.
        index_B: int64 position of each image in its data set; the only identity the random draws see.
        sizes_B2: int64 true (height, width) in pixels of each image, or None when all are H x W.
        offsets_B: int64 first element of each image in the flat buffer, or None.
    """

    images: Tensor
    labels_B: Tensor
    index_B: Tensor
    sizes_B2: Tensor | None = None
    offsets_B: Tensor | None = None

    def __len__(self) -> int:
        return self.index_B.shape[0]
