"""Draws into parameters, in plain batched torch: the formulas that the fused kernels repeat.

In float64, so that every device rounds alike; no host sync, and one graph for torch.compile.

B batch, V views, S slots, P columns, T tries of a random crop. Boxes are (top, left, height, width) in pixels.
"""

import torch
from torch import Tensor

from fastssl.augment.policy import CROPS, NO_SOLARIZE, SLOTS, Column, Crop, Parameters, Slot, Table, View, table_of

Columns = dict[Column, Tensor]


def sample_params(views: tuple[View, ...], draws_BVS: Tensor, sizes_B2: Tensor) -> Parameters:
    """Turn draws into parameters. No host sync; compiles as one graph.

    Args:
        views: the policy's V rows.
        draws_BVS: float32 in [0, 1), S at least `SLOTS`.
        sizes_B2: int64 height and width in pixels of each image.
    """
    table = table_of(views, draws_BVS.device)
    # the fused kernels repeat this sum in this order: every chance and every rounding hangs on its last bit
    value_BVS = table.low_VS + table.span_VS * draws_BVS[..., :SLOTS].double()
    on_BVS = value_BVS > 0
    columns = _boxes(views, table, value_BVS, sizes_B2.double()[:, :, None])
    columns |= _turns(value_BVS, on_BVS) | _jitter(value_BVS, on_BVS) | _late(table.columns, value_BVS, on_BVS)
    # float32 only now: whole pixels survive it, and all backends read the same bits
    return Parameters(torch.stack([columns[column] for column in Column], dim=-1).float())


def _boxes(views: tuple[View, ...], table: Table, value_BVS: Tensor, sizes_B21: Tensor) -> Columns:
    """Crop boxes: each row by its own kind of crop."""
    boxes_BV4: Tensor | None = None
    # every kind is computed for every row: a choice by row would be a shape that depends on values
    for kind in sorted({view.crop for view in views}):
        box = _box(kind, table.columns, value_BVS, sizes_B21[:, 0], sizes_B21[:, 1])
        kind_BV4 = torch.stack([side.expand(value_BVS.shape[:2]) for side in box], dim=-1)
        of_kind_V1 = (table.columns["crop"] == CROPS.index(kind))[:, None]
        boxes_BV4 = kind_BV4 if boxes_BV4 is None else torch.where(of_kind_V1, kind_BV4, boxes_BV4)
    assert boxes_BV4 is not None, "a policy has at least one view"
    return dict(zip((Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH), boxes_BV4.unbind(-1), strict=True))


def _box(
    kind: Crop, columns: dict[str, Tensor], value_BVS: Tensor, height_B1: Tensor, width_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(top, left, height, width), each (B, V) or broadcast to it."""
    match kind:
        case "random_resized":
            return _random_box(columns, value_BVS, height_B1, width_B1)
        case "resize":
            return torch.zeros_like(height_B1), torch.zeros_like(height_B1), height_B1, width_B1
        case "center":
            # at least one pixel, which a small share of a small image would not leave
            side_BV = (torch.minimum(height_B1, width_B1) * columns["area_max"].sqrt()).round().clamp(min=1)
            return _centered(height_B1, width_B1, side_BV, side_BV)
        case "none":
            return _centered(height_B1, width_B1, columns["side_px"], columns["side_px"])
        case "pad":
            pad_V = columns["pad_px"]
            # one place more than both directions have: no shift is one of them
            top_BV = (value_BVS[..., Slot.TOP] * (2 * pad_V + 1)).floor() - pad_V
            left_BV = (value_BVS[..., Slot.LEFT] * (2 * pad_V + 1)).floor() - pad_V
            return top_BV, left_BV, height_B1, width_B1


def _centered(
    height_B1: Tensor, width_B1: Tensor, box_height_BV: Tensor, box_width_BV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # half to even, as torchvision's CenterCrop
    top_BV = ((height_B1 - box_height_BV) / 2).round()
    left_BV = ((width_B1 - box_width_BV) / 2).round()
    return top_BV, left_BV, box_height_BV.expand_as(top_BV), box_width_BV.expand_as(left_BV)


def _random_box(
    columns: dict[str, Tensor], value_BVS: Tensor, height_B1: Tensor, width_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's RandomResizedCrop: the first of T boxes to fit, else the largest allowed one, centered."""
    area_BVT = value_BVS[..., Slot.AREA : Slot.ASPECT] * (height_B1 * width_B1)[..., None]
    aspects_V1 = (columns["aspect_max"] / columns["aspect_min"])[:, None]
    aspect_BVT = columns["aspect_min"][:, None] * aspects_V1 ** value_BVS[..., Slot.ASPECT : Slot.TOP]
    squares_BVT = area_BVT / aspect_BVT, area_BVT * aspect_BVT
    fits_BVT = _rounds_within(squares_BVT[0], height_B1) & _rounds_within(squares_BVT[1], width_B1)
    fits_BV = fits_BVT.any(dim=-1)
    # argmax takes no bools; of equal numbers it gives the first
    first_BV1 = fits_BVT.float().argmax(dim=-1, keepdim=True)
    first_height_BV, first_width_BV = (s.gather(-1, first_BV1)[..., 0].sqrt().round() for s in squares_BVT)
    largest_height_BV = (width_B1 / columns["aspect_min"]).round().clamp(min=1)
    largest_width_BV = (height_B1 * columns["aspect_max"]).round().clamp(min=1)
    # cut to the image: one that is too narrow keeps its width, one too wide its height
    box_height_BV = torch.minimum(torch.where(fits_BV, first_height_BV, largest_height_BV), height_B1)
    box_width_BV = torch.minimum(torch.where(fits_BV, first_width_BV, largest_width_BV), width_B1)
    spare_top_BV, spare_left_BV = height_B1 - box_height_BV, width_B1 - box_width_BV
    # one place more than the spare pixels, so that the floor reaches both ends
    top_BV = torch.where(fits_BV, value_BVS[..., Slot.TOP] * (spare_top_BV + 1), spare_top_BV / 2).floor()
    left_BV = torch.where(fits_BV, value_BVS[..., Slot.LEFT] * (spare_left_BV + 1), spare_left_BV / 2).floor()
    return top_BV, left_BV, box_height_BV, box_width_BV


def _rounds_within(square_BVT: Tensor, whole_B1: Tensor) -> Tensor:
    """Whether the root rounds to a side from 1 to the whole; roots of all the tries would cost more."""
    return (square_BVT > 0.25) & (square_BVT < (whole_B1[..., None] + 0.5) * (whole_B1[..., None] + 0.5))


def _turns(value_BVS: Tensor, on_BVS: Tensor) -> Columns:
    return {
        Column.HFLIP: on_BVS[..., Slot.HFLIP].double(),
        Column.VFLIP: on_BVS[..., Slot.VFLIP].double(),
        Column.TURNS: value_BVS[..., Slot.TURNS].floor() * on_BVS[..., Slot.TURN],
        Column.ROTATE_DEG: value_BVS[..., Slot.ROTATE_DEG] * on_BVS[..., Slot.ROTATE],
    }


def _jitter(value_BVS: Tensor, on_BVS: Tensor) -> Columns:
    on_BV = on_BVS[..., Slot.JITTER]
    return {
        # factors rest at 1, so a product with the flag, as for hue, would not do
        Column.BRIGHTNESS: torch.where(on_BV, value_BVS[..., Slot.BRIGHTNESS], 1.0),
        Column.CONTRAST: torch.where(on_BV, value_BVS[..., Slot.CONTRAST], 1.0),
        Column.SATURATION: torch.where(on_BV, value_BVS[..., Slot.SATURATION], 1.0),
        Column.HUE: value_BVS[..., Slot.HUE] * on_BV,
        Column.ORDER: (value_BVS[..., Slot.ORDER] * on_BV).floor(),
        Column.GRAY: on_BVS[..., Slot.GRAY].double(),
    }


def _late(columns: dict[str, Tensor], value_BVS: Tensor, on_BVS: Tensor) -> Columns:
    """Blur, solarize, posterize and cutout."""
    sigma_BV = value_BVS[..., Slot.BLUR_SIGMA] * on_BVS[..., Slot.BLUR]
    return {
        Column.BLUR_SIGMA_PX: sigma_BV,
        # of the drawn sigma, not the largest: a narrow Gaussian must not pay for the widest
        Column.BLUR_RADIUS_PX: torch.minimum((3 * sigma_BV).ceil(), columns["side_px"] - 1),
        Column.SOLARIZE: torch.where(on_BVS[..., Slot.SOLARIZE], columns["solarize_threshold"], NO_SOLARIZE),
        Column.POSTERIZE_BITS: on_BVS[..., Slot.POSTERIZE] * columns["posterize_bits"],
        # drawn even where nothing is cut out: a side of 0 says so
        Column.CUTOUT_TOP: value_BVS[..., Slot.CUTOUT_TOP].floor(),
        Column.CUTOUT_LEFT: value_BVS[..., Slot.CUTOUT_LEFT].floor(),
        Column.CUTOUT_SIDE: on_BVS[..., Slot.CUTOUT] * columns["cutout_side_px"],
    }
