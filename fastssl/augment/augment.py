"""uint8 images in, normalized views out: draw, turn the draws into parameters, apply them.

B batch, V views, S side of a view, C channels.
"""

import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastssl.augment import torch_ops
from fastssl.augment.draws import Draw, draws
from fastssl.augment.policy import SLOTS, Parameters, View, parameters

# numba's simplest threading layer, the one that is always there, ends the process when two threads use it at once
_turn = threading.Lock()


@dataclass(frozen=True)
class Augment:
    """Cuts V views from each image of a batch; what sample i gets in epoch e depends on nothing else.

    Attributes:
        views: the policy, one row per view.
        mean_C, std_C: normalization in [0, 1] units of the image's full range, one number per channel.
        seed: of every draw.
        dtype: of the views: float32, bfloat16 or float16.
        backend: "torch" (any device), "cpu" (fused numba) or "cuda" (fused Triton).
    """

    views: tuple[View, ...]
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    seed: int
    dtype: torch.dtype
    backend: Literal["torch", "cpu", "cuda"]

    def __call__(
        self,
        images: Tensor,
        index_B: Tensor,
        epoch: int | Tensor,
        *,
        sizes_B2: Tensor | None = None,
        offsets_B: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Augment a batch.

        Args:
            images: uint8 or uint16 (B, H, W, C), or a flat buffer with `offsets_B` and `sizes_B2`.
            index_B: int64 position of each image in its data set.
            epoch: epoch number, or an int64 scalar on the images' device.
            sizes_B2: int64 true (height, width) of padded or flat images.
            offsets_B: int64 first element of each image in the flat buffer.

        Returns:
            One views_VBCHW for each run of consecutive rows of equal side_px. `.flatten(0, 1)` of each is
            channels_last.
        """
        if sizes_B2 is None:
            sizes_B2 = _equal_sizes(images)
        if self.backend == "cpu":
            with _turn:
                return self._made(images, index_B, epoch, sizes_B2, offsets_B)
        return self._made(images, index_B, epoch, sizes_B2, offsets_B)

    def _made(
        self, images: Tensor, index_B: Tensor, epoch: int | Tensor, sizes_B2: Tensor, offsets_B: Tensor | None
    ) -> tuple[Tensor, ...]:
        runs = torch_ops.runs(tuple(view.side_px for view in self.views))
        if self.backend == "cpu":  # one launch draws, settles and applies
            drawn: list[Parameters | Draw] = [Draw(self.seed, epoch, index_B, first) for first, _ in runs]
        else:
            settled = self.parameters(index_B, epoch, sizes_B2)
            drawn = [settled.rows(first, last) for first, last in runs]
        return tuple(
            _apply(self, images, sizes_B2, offsets_B, some, self.views[first:last])
            for some, (first, last) in zip(drawn, runs, strict=True)
        )

    def parameters(self, index_B: Tensor, epoch: int | Tensor, sizes_B2: Tensor) -> Parameters:
        """What a call with the same arguments applies."""
        draw, settle = draws, parameters
        if self.backend == "cpu":
            from fastssl.augment.cpu.backend import draws as draw  # the same bits, sooner
            from fastssl.augment.cpu.backend import parameters as settle
        elif self.backend == "cuda":
            from fastssl.augment.cuda.backend import draws as draw  # the same bits, in one launch

        drawn_BVS = draw(self.seed, epoch, index_B, views=len(self.views), slots=SLOTS)
        return settle(self.views, drawn_BVS, sizes_B2)


def _equal_sizes(images: Tensor) -> Tensor:
    assert images.ndim == 4, "a flat buffer needs sizes_B2 and offsets_B"
    batch, height, width, _ = images.shape
    sides = [torch.full((batch,), side, dtype=torch.int64, device=images.device) for side in (height, width)]
    return torch.stack(sides, dim=1)


def _apply(
    augment: Augment,
    images: Tensor,
    sizes_B2: Tensor,
    offsets_B: Tensor | None,
    drawn: Parameters | Draw,
    views: tuple[View, ...],
) -> Tensor:
    place, norm = (images, sizes_B2, offsets_B), (augment.mean_C, augment.std_C, augment.dtype)
    if augment.backend == "cpu":
        from fastssl.augment.cpu import backend as cpu  # numba takes half a second to import

        return cpu.apply(*place, drawn, views, *norm)
    assert isinstance(drawn, Parameters)
    if augment.backend == "cuda":
        from fastssl.augment.cuda import backend as cuda  # Triton exists on CUDA machines only

        return cuda.apply(*place, drawn, views, *norm)
    return torch_ops.apply(*place, drawn, views, *norm)
