"""Embedded data: small color images of ten shapes, drawn by a function of (seed, index) alone.

Choice made: signed distances in numba, one independent counter-based stream per image, so that any slice of
any set is reproducible on its own, in any order, on any number of threads. Color, place, size, angle and
texture are drawn independently of the class: raw pixels say little, the outline says all. Every class keeps
its identity under rotation and mirroring.

N images, H = W = side_px, C = 3.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numpy.typing import NDArray

CLASSES = ("bars", "circle", "crescent", "cross", "dots", "frame", "ring", "square", "star", "triangle")

# Slots of the per-image stream: which draw feeds which property. Pixel noise starts at _NOISE.
_RADIUS, _X, _Y, _ANGLE, _GAP, _POLARITY, _LUMA, _COLORS, _WAVES, _NOISE = 0, 1, 2, 3, 4, 5, 6, 8, 24, 64

_RADIUS_MIN, _RADIUS_MAX = 0.24, 0.40  # of the side: a shape spans 48 to 80 % of it
_GAP_MIN, _GAP_MAX = 0.30, 0.40  # luma of the shape against the background right next to it, of the full range
_NOISE_AMPLITUDE = 0.04
_SATURATION = 0.15  # at most, of what the luma leaves room for: color must not be the easy way to tell images apart
_PART = 256  # images one thread draws at a time


def images(count: int, side_px: int, *, seed: int, start: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images `start` to `start + count` of the endless set that `seed` names.

    Args:
        count: number of images, N.
        side_px: height and width; 16 and more keep the classes apart.
        seed: names the set; sets of different seeds share no image.
        start: index of the first image.

    Returns:
        Images, uint8 (N, H, W, 3), and classes, int64 (N,): image i is of class i % 10, so every run of ten
        consecutive images holds each class once.
    """
    images_NHWC = np.empty((count, side_px, side_px, 3), np.uint8)
    seed64 = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)  # numba turns uint64 + int64 into float64: uint64 throughout
    starts = range(0, count, _PART) if count > _PART else ()
    if starts:
        with ThreadPoolExecutor() as pool:  # threads of ours: numba's own may not be entered from two at once
            list(pool.map(lambda i: _render(images_NHWC[i : i + _PART], seed64, np.uint64(start + i)), starts))
    else:
        _render(images_NHWC, seed64, np.uint64(start))
    return images_NHWC, np.arange(start, start + count, dtype=np.int64) % len(CLASSES)


@numba.njit(cache=True)
def _mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finalizer: uint64 -> uint64, every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True)
def _uniform(key: np.uint64, slot: int) -> float:
    """Draw `slot` of the stream `key`, float64 in [0, 1)."""
    bits = _mix(key + np.uint64(slot) * np.uint64(0x9E3779B97F4A7C15))
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True)
def _box(x: float, y: float, half_x: float, half_y: float) -> float:
    return max(abs(x) - half_x, abs(y) - half_y)


@numba.njit(cache=True)
def _polygon(x: float, y: float, corners: float, inner: float) -> float:
    """Distance to a regular polygon (`inner` = cos(pi / corners)) or star (less), circumscribed radius 1."""
    sector = math.pi / corners
    angle = abs((math.atan2(y, x) + sector) % (2 * sector) - sector)
    radius = math.sqrt(x * x + y * y)
    u, v = radius * math.cos(angle), radius * math.sin(angle)
    tip_u, tip_v = inner * math.cos(sector), inner * math.sin(sector)
    edge_u, edge_v = tip_u - 1.0, tip_v
    return -((u - 1.0) * -edge_v + v * edge_u) / math.hypot(edge_u, edge_v)


@numba.njit(cache=True)
def _distance(kind: int, x: float, y: float) -> float:
    """Signed distance to the outline of class `kind` in its own frame (circumscribed radius 1), < 0 inside."""
    radius = math.sqrt(x * x + y * y)
    distance: float
    if kind == 0:  # bars
        distance = min(_box(x, y, 0.14, 0.77), _box(abs(x) - 0.62, y, 0.14, 0.77))
    elif kind == 1:  # circle
        distance = radius - 0.92
    elif kind == 2:  # crescent
        distance = max(radius - 0.98, 0.78 - math.sqrt((x - 0.5) ** 2 + y * y))
    elif kind == 3:  # cross
        distance = min(_box(x, y, 0.95, 0.25), _box(x, y, 0.25, 0.95))
    elif kind == 4:  # dots: four discs
        distance = math.sqrt((abs(x) - 0.55) ** 2 + (abs(y) - 0.55) ** 2) - 0.36
    elif kind == 5:  # frame
        distance = max(_box(x, y, 0.72, 0.72), -_box(x, y, 0.44, 0.44))
    elif kind == 6:  # ring
        distance = abs(radius - 0.77) - 0.19
    elif kind == 7:  # square
        distance = _box(x, y, 0.71, 0.71)
    elif kind == 8:  # star
        distance = _polygon(x, y, 5.0, 0.42)
    else:  # triangle
        distance = _polygon(x, y, 3.0, 0.5)
    return distance


@numba.njit(cache=True)
def _color(luma: float, angle: float, saturation: float, out_C: NDArray[np.float64]) -> None:
    """An RGB color in [0, 1] of exactly this luma: the chroma shrinks until it fits the cube."""
    red, blue = math.cos(angle), math.sin(angle)
    green = -(0.299 * red + 0.114 * blue) / 0.587
    room = min(luma, 1.0 - luma)
    scale = saturation * room / max(abs(red), abs(green), abs(blue))
    out_C[0], out_C[1], out_C[2] = luma + scale * red, luma + scale * green, luma + scale * blue


@numba.njit(cache=True)
def _palette(key: np.uint64, colors_223: NDArray[np.float64]) -> None:
    """Draw the colors of background and shape at either end of the texture, float64 (part, end, rgb) in [0, 1].

    At each end the shape's luma is _GAP_MIN to _GAP_MAX above, or below, the background's.
    """
    gap = _GAP_MIN + (_GAP_MAX - _GAP_MIN) * _uniform(key, _GAP)
    flip = np.int64(_uniform(key, _POLARITY) < 0.5)
    for part in range(2):
        for end in range(2):
            slot = _COLORS + 3 * (2 * part + end)
            luma = 0.05 + 0.15 * _uniform(key, _LUMA + end) + end * (0.78 - gap) + (part ^ flip) * gap
            _color(
                luma,
                2 * math.pi * _uniform(key, slot),
                _SATURATION * _uniform(key, slot + 1),
                colors_223[part, end],
            )


@numba.njit(cache=True)
def _waves(key: np.uint64, waves_23: NDArray[np.float64]) -> None:
    """Draw the texture's two slow plane waves: radians over the side along x and along y, phase."""
    for i in range(2):
        cycles = 0.3 + _uniform(key, _WAVES + 3 * i)
        bearing = 2 * math.pi * _uniform(key, _WAVES + 3 * i + 1)
        waves_23[i, 0] = 2 * math.pi * cycles * math.cos(bearing)
        waves_23[i, 1] = 2 * math.pi * cycles * math.sin(bearing)
        waves_23[i, 2] = 2 * math.pi * _uniform(key, _WAVES + 3 * i + 2)


@numba.njit(cache=True)
def _render_one(image_HWC: NDArray[np.uint8], kind: int, key: np.uint64) -> None:
    side_px = image_HWC.shape[0]
    radius = _RADIUS_MIN + (_RADIUS_MAX - _RADIUS_MIN) * _uniform(key, _RADIUS)
    center_x = radius + (1 - 2 * radius) * _uniform(key, _X)
    center_y = radius + (1 - 2 * radius) * _uniform(key, _Y)
    turn = 2 * math.pi * _uniform(key, _ANGLE)
    cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
    colors_223, waves_23, phasors_24 = np.empty((2, 2, 3)), np.empty((2, 3)), np.empty((2, 4))
    _palette(key, colors_223)
    _waves(key, waves_23)
    for row in range(side_px):
        y = (row + 0.5) / side_px
        for i in range(2):  # a wave along a row is a rotation: four multiplications a pixel, not a sine
            angle, step = waves_23[i, 1] * y + waves_23[i, 2], waves_23[i, 0] / side_px
            phasors_24[i, 0], phasors_24[i, 1] = math.cos(angle), math.sin(angle)
            phasors_24[i, 2], phasors_24[i, 3] = math.cos(step), math.sin(step)
        for column in range(side_px):
            for i in range(2):
                c, s = phasors_24[i, 0], phasors_24[i, 1]
                phasors_24[i, 0] = c * phasors_24[i, 2] - s * phasors_24[i, 3]
                phasors_24[i, 1] = s * phasors_24[i, 2] + c * phasors_24[i, 3]
            dx, dy = (column + 0.5) / side_px - center_x, y - center_y
            distance_px = _distance(kind, cos * dx + sin * dy, cos * dy - sin * dx) * radius * side_px
            cover = min(max(0.5 - distance_px, 0.0), 1.0)
            blend = min(max(0.5 + 0.4 * (phasors_24[0, 1] + phasors_24[1, 1]), 0.0), 1.0)
            noise = _NOISE_AMPLITUDE * (2 * _uniform(key, _NOISE + row * side_px + column) - 1)
            for c in range(3):
                behind = colors_223[0, 0, c] + (colors_223[0, 1, c] - colors_223[0, 0, c]) * blend
                before = colors_223[1, 0, c] + (colors_223[1, 1, c] - colors_223[1, 0, c]) * blend
                value = behind + (before - behind) * cover + noise
                image_HWC[row, column, c] = np.uint8(min(max(value, 0.0), 1.0) * 255.0 + 0.5)


@numba.njit(cache=True, nogil=True)
def _render(images_NHWC: NDArray[np.uint8], seed: np.uint64, start: np.uint64) -> None:
    base = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
    for n in range(images_NHWC.shape[0]):
        index = start + np.uint64(n)
        _render_one(images_NHWC[n], np.int64(index % np.uint64(10)), _mix(base ^ _mix(index)))
