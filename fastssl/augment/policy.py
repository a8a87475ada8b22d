"""A policy is a table, one row per view; this file says which draw serves what and what a backend is handed.

Drawing is apart from applying: a crop box, a hue shift or a blur width is sampled once and packed as one float32
tensor. An operation that was not drawn holds the value that changes nothing, so a backend needs no second flag.

B batch, V views, S slots, P columns.
"""

import math
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# as torchvision's RandomResizedCrop: then the largest centered crop of an allowed shape
TRIES = 10
JITTER_ORDERS = tuple(permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue
# a threshold above every pixel
NO_SOLARIZE = 2.0

Crop = Literal["random_resized", "resize", "center", "pad", "none"]
# a crop's position here stands for it in tables and kernels, which hold numbers only
CROPS: tuple[Crop, ...] = get_args(Crop)


@dataclass(frozen=True, slots=True)
class View:
    """One row of the policy: the recipe's `ViewSpec`, whose defaults and limits `recipe` alone decides.

    Probabilities (`_p`) are in [0, 1]; each sample draws for itself.

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

    # no defaults: `recipe` decides them, and a second home would drift away
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


class Offset(IntEnum):
    """Members count up from 0 in their order."""

    # members are offsets into tensors, and auto() would begin at 1
    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class Slot(Offset):
    """Which draw serves what. New slots go at the end: the others keep their places and so their values."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        # AREA and ASPECT hold a draw for each try
        return TRIES * min(count, 2) + max(count - 2, 0)

    AREA = auto()
    ASPECT = auto()
    TOP = auto()
    LEFT = auto()
    HFLIP = auto()
    VFLIP = auto()
    # whether and by how much are two draws: another chance leaves the amounts as they were
    TURN = auto()
    TURNS = auto()
    ROTATE = auto()
    ROTATE_DEG = auto()
    # one draw for the four after it, which apply together or not at all, as in the papers
    JITTER = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    ORDER = auto()
    GRAY = auto()
    BLUR = auto()
    BLUR_SIGMA = auto()
    SOLARIZE = auto()
    POSTERIZE = auto()
    CUTOUT = auto()
    CUTOUT_TOP = auto()
    CUTOUT_LEFT = auto()


SLOTS = max(Slot) + 1


class Column(Offset):
    """What the packed parameters hold, with the value that changes nothing in brackets."""

    # a box may reach beyond the image: "pad" and "none" ask for black there
    TOP = auto()
    LEFT = auto()
    HEIGHT = auto()
    WIDTH = auto()
    # flags are floats too, so that one tensor holds everything
    HFLIP = auto()  # 0 or 1 [0]
    VFLIP = auto()  # 0 or 1 [0]
    TURNS = auto()  # quarter turns counterclockwise, 0 to 3 [0]
    ROTATE_DEG = auto()  # counterclockwise [0]
    BRIGHTNESS = auto()  # factor [1]
    CONTRAST = auto()  # factor [1]
    SATURATION = auto()  # factor [1]
    HUE = auto()  # turns [0]
    ORDER = auto()  # position in JITTER_ORDERS [0]
    GRAY = auto()  # 0 or 1 [0]
    BLUR_SIGMA_PX = auto()  # [0]
    # not left to the backends: a sigma rounded to float32 could reach a tap more
    BLUR_RADIUS_PX = auto()  # taps on each side of the center [0]
    SOLARIZE = auto()  # threshold in [0, 1] [NO_SOLARIZE]
    POSTERIZE_BITS = auto()  # [0]
    CUTOUT_TOP = auto()  # view pixels
    CUTOUT_LEFT = auto()  # view pixels
    CUTOUT_SIDE = auto()  # view pixels [0]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The sampled numbers: float32 (B, V, P), one column for each member of `Column`."""

    # one tensor: a single copy takes it to the device, a single slice to some of the views
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


def runs(rows: tuple[object, ...]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of equal consecutive rows."""
    # neighbors only, so that a run is a slice and nothing has to be gathered
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, copied to the device once: a copy in every step would wait for the device."""
    if torch.compiler.is_compiling():
        # becomes part of the graph
        return torch.tensor(values, dtype=dtype, device=device)
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
    # one place more than the spare pixels, so that the floor reaches both ends
    cutout_px = float(view.side_px - cutout_side_px(view) + 1)
    # a span of 0 always gives order 0, the fixed one
    orders = len(JITTER_ORDERS) if view.jitter_order == "random" else 0
    of_slot = {
        Slot.AREA: (view.area_min, view.area_max - view.area_min),
        # the exponent of a ratio, so that a shape and its mirror are as likely
        Slot.ASPECT: (0.0, 1.0),
        # a share of what the box leaves, which only the image decides
        Slot.TOP: (0.0, 1.0),
        Slot.LEFT: (0.0, 1.0),
        Slot.HFLIP: _chance(view.hflip_p),
        Slot.VFLIP: _chance(view.vflip_p),
        Slot.TURN: _chance(view.quarter_turn_p),
        # rounded down 1, 2 or 3: never the turn that changes nothing
        Slot.TURNS: (1.0, 3.0),
        Slot.ROTATE: _chance(view.rotate_p),
        Slot.ROTATE_DEG: (-view.rotate_max_deg, 2 * view.rotate_max_deg),
        Slot.JITTER: _chance(view.jitter_p),
        Slot.BRIGHTNESS: _factor(view.brightness),
        Slot.CONTRAST: _factor(view.contrast),
        Slot.SATURATION: _factor(view.saturation),
        Slot.HUE: (-view.hue, 2 * view.hue),
        Slot.ORDER: (0.0, float(orders)),
        Slot.GRAY: _chance(view.gray_p),
        Slot.BLUR: _chance(view.blur_p),
        Slot.BLUR_SIGMA: (view.blur_sigma_min_px, view.blur_sigma_max_px - view.blur_sigma_min_px),
        Slot.SOLARIZE: _chance(view.solarize_p),
        Slot.POSTERIZE: _chance(view.posterize_p),
        Slot.CUTOUT: _chance(view.cutout_p),
        Slot.CUTOUT_TOP: (0.0, cutout_px),
        Slot.CUTOUT_LEFT: (0.0, cutout_px),
    }
    # before TOP lie the tries of AREA and ASPECT, each with the same range
    return [of_slot[slot] for slot in Slot for _ in range(TRIES if slot < Slot.TOP else 1)]


def _factor(strength: float) -> tuple[float, float]:
    # torchvision's range, of which only the low end is cut at 0
    weakest = max(0.0, 1 - strength)
    return weakest, 1 + strength - weakest


def _chance(p: float) -> tuple[float, float]:
    # draws lie in [0, 1), so p - draw > 0 never happens for p = 0 and always for p = 1
    return p, -1.0


def table_of(views: tuple[View, ...], device: torch.device) -> Table:
    """The policy's numbers, in the form that `sample_params` works with."""
    if torch.compiler.is_compiling():
        return _build_table(views, device)
    return _cached_table(views, device)


def _build_table(views: tuple[View, ...], device: torch.device) -> Table:
    # float64, so that a number on the edge of a rounding falls the same way on every device
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
