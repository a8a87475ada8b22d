"""A policy is a table, one row per view; this file turns it and the draws into numbers the backends obey.

Drawing is apart from applying: a crop box, a hue shift or a blur width is settled here once, in float64 so
that every device rounds alike, and packed as one float32 tensor. An operation that was not drawn holds the
value that changes nothing, so an backend needs no second flag.

B batch, V views, S slots, P columns, T tries of a random crop. Boxes are (top, left, height, width) in
pixels.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

TRIES = 10  # as torchvision's RandomResizedCrop: then the largest centered crop of an allowed shape
JITTER_ORDERS = tuple(permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue
NO_SOLARIZE = 2.0  # a threshold above every pixel

Crop = Literal["random_resized", "resize", "center", "pad", "none"]
CROPS: tuple[Crop, ...] = get_args(Crop)


@dataclass(frozen=True, slots=True)
class View:
    """One row of the policy. Probabilities (`_p`) are in [0, 1]; each sample draws for itself.

    The operations run in the order of the fields: crop, flips and turns, jitter, grayscale, blur, solarize,
    posterize, cutout. Color operations apply to three channels only.

    Attributes:
        side_px: height and width of the finished view.
        crop: "random_resized" (a box of drawn area and shape), "resize" (the whole image, its shape not
            kept), "center" (the largest centered square, its side times sqrt(area_max)), "pad" (the image
            shifted by up to `pad_px`, black outside), "none" (the central side_px x side_px, never scaled).
        area_min, area_max: share of the image's area, in (0, 1].
        aspect_min, aspect_max: width over height of the box, drawn log-uniformly.
        interpolation: when shrinking, both weigh all the pixels they cover (torchvision's antialias=True).
        pad_px: largest shift of "pad".
        quarter_turn_p: chance of a turn by 90, 180 or 270 degrees, equally likely.
        rotate_p, rotate_max_deg: chance of a turn by an angle in [-max, max], bilinear, black outside.
        jitter_p: chance that the four below apply; factors come from [max(0, 1 - x), 1 + x].
        hue: shift in turns, from [-hue, hue], at most 0.5.
        hue_mode: "hsv" as torchvision, or "linear": a rotation about the gray axis of YIQ.
        jitter_order: "fixed" (brightness, contrast, saturation, hue) or "random" (drawn for each sample).
        blur_sigma_min_px, blur_sigma_max_px: Gaussian's sigma; its kernel reaches 3 sigma.
        solarize_threshold: pixels at or above it are inverted, in [0, 1].
        posterize_bits: bits kept, 1 to 8.
        cutout_fraction: side of the square that is set to the mean, as a share of side_px.
    """

    side_px: int
    crop: Crop
    area_min: float
    area_max: float
    aspect_min: float
    aspect_max: float
    interpolation: Literal["bilinear", "bicubic"]
    pad_px: int
    hflip_p: float
    vflip_p: float
    quarter_turn_p: float
    rotate_p: float
    rotate_max_deg: float
    jitter_p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    hue_mode: Literal["hsv", "linear"]
    jitter_order: Literal["fixed", "random"]
    gray_p: float
    blur_p: float
    blur_sigma_min_px: float
    blur_sigma_max_px: float
    solarize_p: float
    solarize_threshold: float
    posterize_p: float
    posterize_bits: int
    cutout_p: float
    cutout_fraction: float


class Slot(IntEnum):
    """Which draw serves what. New slots go at the end: the others keep their numbers and so their values."""

    AREA = 0
    ASPECT = TRIES
    TOP = 2 * TRIES
    LEFT = 21
    HFLIP = 22
    VFLIP = 23
    TURN = 24
    TURNS = 25
    ROTATE = 26
    ROTATE_DEG = 27
    JITTER = 28
    BRIGHTNESS = 29
    CONTRAST = 30
    SATURATION = 31
    HUE = 32
    ORDER = 33
    GRAY = 34
    BLUR = 35
    BLUR_SIGMA = 36
    SOLARIZE = 37
    POSTERIZE = 38
    CUTOUT = 39
    CUTOUT_TOP = 40
    CUTOUT_LEFT = 41


SLOTS = len(Slot) + 2 * (TRIES - 1)


class Column(IntEnum):
    """What the packed parameters hold, with the value that changes nothing in brackets."""

    TOP = 0
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    HFLIP = 4  # 0 or 1 [0]
    VFLIP = 5  # 0 or 1 [0]
    TURNS = 6  # quarter turns counterclockwise, 0 to 3 [0]
    ROTATE_DEG = 7  # counterclockwise [0]
    BRIGHTNESS = 8  # factor [1]
    CONTRAST = 9  # factor [1]
    SATURATION = 10  # factor [1]
    HUE = 11  # turns [0]
    ORDER = 12  # position in JITTER_ORDERS [0]
    GRAY = 13  # 0 or 1 [0]
    BLUR_SIGMA_PX = 14  # [0]
    BLUR_RADIUS_PX = 15  # taps on each side of the center [0]
    SOLARIZE = 16  # threshold in [0, 1] [NO_SOLARIZE]
    POSTERIZE_BITS = 17  # [0]
    CUTOUT_TOP = 18  # view pixels
    CUTOUT_LEFT = 19  # view pixels
    CUTOUT_SIDE = 20  # view pixels [0]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The drawn numbers: float32 (B, V, P), one column for each member of `Column`."""

    packed_BVP: Tensor

    def __getitem__(self, column: Column) -> Tensor:
        return self.packed_BVP[..., int(column)]

    def rows(self, first: int, last: int) -> "Parameters":
        """The parameters of views `first` to `last` - 1."""
        return Parameters(self.packed_BVP[:, first:last])


@dataclass(frozen=True, slots=True)
class Table:
    """A slot's value is low + span * draw. A chance holds p - draw: positive, it happens."""

    low_VS: Tensor
    span_VS: Tensor
    columns: dict[str, Tensor]


def parameters(views: tuple[View, ...], draws_BVS: Tensor, sizes_B2: Tensor) -> Parameters:
    """Turn draws into parameters. No host sync; compiles as one graph.

    Args:
        views: the policy's V rows.
        draws_BVS: float32 in [0, 1), S at least `SLOTS`.
        sizes_B2: int64 height and width in pixels of each image.
    """
    table = table_of(views, draws_BVS.device)
    value_BVS = table.low_VS + table.span_VS * draws_BVS[..., :SLOTS].double()
    on_BVS = value_BVS > 0
    packed = [_boxes(views, table, value_BVS, sizes_B2.double()[:, :, None])]
    packed += [on_BVS[..., Slot.HFLIP : Slot.VFLIP + 1].double(), _turns(value_BVS, on_BVS)]
    packed += [_jitter(value_BVS, on_BVS), on_BVS[..., Slot.GRAY, None].double()]
    packed += [_late(table.columns, value_BVS, on_BVS)]
    return Parameters(torch.cat(packed, dim=-1).float())


def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, copied to the device once: a copy in every step would wait for the device."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)  # becomes part of the graph
    return _cached_constant(values, dtype, device)


@lru_cache(maxsize=1024)
def _cached_constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def blur_radius_px(sigma_px: float, side_px: int) -> int:
    """Taps on each side of the center; a reflected border is never wider than the view."""
    return min(math.ceil(3 * sigma_px), side_px - 1)


def cutout_side_px(view: View) -> int:
    """Side of the square that cutout covers."""
    return round(view.cutout_fraction * view.side_px)


def _ranges(view: View) -> list[tuple[float, float]]:
    """(low, span) of each slot, in the slots' order."""
    area = (view.area_min, view.area_max - view.area_min)
    weakest = [max(0.0, 1 - strength) for strength in (view.brightness, view.contrast, view.saturation)]
    uniform, cutout = (0.0, 1.0), (0.0, float(view.side_px - cutout_side_px(view) + 1))
    return [
        *([area] * TRIES + [uniform] * TRIES + [uniform, uniform]),
        *(_chance(view.hflip_p), _chance(view.vflip_p), _chance(view.quarter_turn_p), (1.0, 3.0)),
        *(_chance(view.rotate_p), (-view.rotate_max_deg, 2 * view.rotate_max_deg)),
        _chance(view.jitter_p),
        (weakest[0], 1 + view.brightness - weakest[0]),
        (weakest[1], 1 + view.contrast - weakest[1]),
        (weakest[2], 1 + view.saturation - weakest[2]),
        (-view.hue, 2 * view.hue),
        (0.0, float(len(JITTER_ORDERS)) if view.jitter_order == "random" else 0.0),
        *(_chance(view.gray_p), _chance(view.blur_p)),
        (view.blur_sigma_min_px, view.blur_sigma_max_px - view.blur_sigma_min_px),
        *(_chance(view.solarize_p), _chance(view.posterize_p), _chance(view.cutout_p), cutout, cutout),
    ]


def _chance(p: float) -> tuple[float, float]:
    return p, -1.0


def table_of(views: tuple[View, ...], device: torch.device) -> Table:
    """The policy's numbers, in the form that `parameters` works with."""
    if torch.compiler.is_compiling():
        return _build_table(views, device)
    return _cached_table(views, device)


def _build_table(views: tuple[View, ...], device: torch.device) -> Table:
    table_VS2 = constant(tuple(tuple(_ranges(view)) for view in views), torch.float64, device)
    columns: dict[str, list[float]] = {
        "side_px": [view.side_px for view in views],
        "crop": [CROPS.index(view.crop) for view in views],
        "pad_px": [view.pad_px for view in views],
        "area_max": [view.area_max for view in views],
        "aspect_min": [view.aspect_min for view in views],
        "aspect_max": [view.aspect_max for view in views],
        "solarize_threshold": [view.solarize_threshold for view in views],
        "posterize_bits": [view.posterize_bits for view in views],
        "cutout_side_px": [cutout_side_px(view) for view in views],
    }
    tensors = {name: constant(tuple(column), torch.float64, device) for name, column in columns.items()}
    return Table(table_VS2[..., 0], table_VS2[..., 1], tensors)


_cached_table = lru_cache(maxsize=64)(_build_table)


def _boxes(views: tuple[View, ...], table: Table, value_BVS: Tensor, sizes_B21: Tensor) -> Tensor:
    """Crop boxes (B, V, 4): each row by its own kind of crop."""
    boxes_BV4: Tensor | None = None
    for kind in sorted({view.crop for view in views}):
        box = _box(kind, table.columns, value_BVS, sizes_B21[:, 0], sizes_B21[:, 1])
        kind_BV4 = torch.stack([side.expand(value_BVS.shape[:2]) for side in box], dim=-1)
        of_kind_V1 = (table.columns["crop"] == CROPS.index(kind))[:, None]
        boxes_BV4 = kind_BV4 if boxes_BV4 is None else torch.where(of_kind_V1, kind_BV4, boxes_BV4)
    assert boxes_BV4 is not None, "a policy has at least one view"
    return boxes_BV4


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
            side_BV = (torch.minimum(height_B1, width_B1) * columns["area_max"].sqrt()).round().clamp(min=1)
            return _centered(height_B1, width_B1, side_BV, side_BV)
        case "none":
            return _centered(height_B1, width_B1, columns["side_px"], columns["side_px"])
        case "pad":
            pad_V = columns["pad_px"]
            top_BV = (value_BVS[..., Slot.TOP] * (2 * pad_V + 1)).floor() - pad_V
            left_BV = (value_BVS[..., Slot.LEFT] * (2 * pad_V + 1)).floor() - pad_V
            return top_BV, left_BV, height_B1, width_B1


def _centered(
    height_B1: Tensor, width_B1: Tensor, box_height_BV: Tensor, box_width_BV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    drawn_BV = fits_BVT.any(dim=-1)
    first_BV1 = fits_BVT.float().argmax(dim=-1, keepdim=True)
    first_height_BV, first_width_BV = (s.gather(-1, first_BV1)[..., 0].sqrt().round() for s in squares_BVT)
    largest_height_BV = (width_B1 / columns["aspect_min"]).round().clamp(min=1)
    largest_width_BV = (height_B1 * columns["aspect_max"]).round().clamp(min=1)
    box_height_BV = torch.minimum(torch.where(drawn_BV, first_height_BV, largest_height_BV), height_B1)
    box_width_BV = torch.minimum(torch.where(drawn_BV, first_width_BV, largest_width_BV), width_B1)
    spare_top_BV, spare_left_BV = height_B1 - box_height_BV, width_B1 - box_width_BV
    top_BV = torch.where(drawn_BV, value_BVS[..., Slot.TOP] * (spare_top_BV + 1), spare_top_BV / 2).floor()
    left_BV = torch.where(drawn_BV, value_BVS[..., Slot.LEFT] * (spare_left_BV + 1), spare_left_BV / 2).floor()
    return top_BV, left_BV, box_height_BV, box_width_BV


def _rounds_within(square_BVT: Tensor, whole_B1: Tensor) -> Tensor:
    """Whether the root rounds to a side from 1 to the whole; roots of all the tries would cost more."""
    return (square_BVT > 0.25) & (square_BVT < (whole_B1[..., None] + 0.5) * (whole_B1[..., None] + 0.5))


def _turns(value_BVS: Tensor, on_BVS: Tensor) -> Tensor:
    quarter_BV = value_BVS[..., Slot.TURNS].floor() * on_BVS[..., Slot.TURN]
    angle_BV = value_BVS[..., Slot.ROTATE_DEG] * on_BVS[..., Slot.ROTATE]
    return torch.stack((quarter_BV, angle_BV), dim=-1)


def _jitter(value_BVS: Tensor, on_BVS: Tensor) -> Tensor:
    on_BV1 = on_BVS[..., Slot.JITTER, None]
    factors_BV3 = torch.where(on_BV1, value_BVS[..., Slot.BRIGHTNESS : Slot.HUE], 1.0)
    hue_order_BV2 = value_BVS[..., Slot.HUE : Slot.ORDER + 1] * on_BV1
    return torch.cat((factors_BV3, hue_order_BV2[..., :1], hue_order_BV2[..., 1:].floor()), dim=-1)


def _late(columns: dict[str, Tensor], value_BVS: Tensor, on_BVS: Tensor) -> Tensor:
    """Blur, solarize, posterize and cutout: columns BLUR_SIGMA_PX to CUTOUT_SIDE."""
    sigma_BV = value_BVS[..., Slot.BLUR_SIGMA] * on_BVS[..., Slot.BLUR]
    radius_BV = torch.minimum((3 * sigma_BV).ceil(), columns["side_px"] - 1)
    threshold_BV = torch.where(on_BVS[..., Slot.SOLARIZE], columns["solarize_threshold"], NO_SOLARIZE)
    bits_BV = on_BVS[..., Slot.POSTERIZE] * columns["posterize_bits"]
    top_BV = value_BVS[..., Slot.CUTOUT_TOP].floor()
    left_BV = value_BVS[..., Slot.CUTOUT_LEFT].floor()
    side_BV = on_BVS[..., Slot.CUTOUT] * columns["cutout_side_px"]
    return torch.stack((sigma_BV, radius_BV, threshold_BV, bits_BV, top_BV, left_BV, side_BV), dim=-1)
