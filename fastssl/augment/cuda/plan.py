"""What the CUDA kernels are compiled for, and the constants they share with the policy.

Triton keeps compiled kernels on disk under the text of what they use. The text of an enum or of a property does not
show its numbers, so every number here stands in a plain namespace or a field: a change of it is another kernel.
"""

from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace

import triton.language as tl

from fastssl.augment.policy import Column


class Pass(IntEnum):
    """What one launch does; each view leaves after the last pass that it needs."""

    CROP = 0
    ROTATE = 1
    COLOR = 2
    BLUR = 3


class Weights(IntEnum):
    """What a line of a view weighs its source lines by."""

    BILINEAR = 0
    BICUBIC = 1
    GAUSSIAN = 2


# sine and cosine follow the policy's columns: in a pixel kernel they would cost every thread a stack frame
TURNS = ("ROTATE_COS", "ROTATE_SIN", "HUE_COS", "HUE_SIN")
ROW = {name: i for i, name in enumerate([*Column.__members__, *TURNS])}


def numbers(names: dict[str, int]) -> tl.constexpr:
    """Named numbers as one constant of a kernel, whose text shows them."""
    return tl.constexpr(SimpleNamespace(**names))


# wrapped, because a kernel may use no other globals than tl.constexpr
COLUMN = numbers(ROW)
WIDTH = tl.constexpr(len(ROW))
# the enums once more, in a form whose text shows Triton's disk cache their numbers
PASS = numbers({member.name: int(member) for member in Pass})
WEIGHTS = numbers({member.name: int(member) for member in Weights})


# one constant in place of many: Triton tells kernels apart by its hash and its text
@dataclass(frozen=True, slots=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
        tile: side of the square that a program works on, a power of 2.
        pixels: of a tile.
        across: tiles along a side.
        parts: tiles of a view, filled up to a power of 2.
        whole: whether a tile holds the view, so that the scratch copy is not needed.
        waits: whether a tile's colors may need to see the other tiles first: after a rotation, or for contrast.
        resize: `Weights` of the crop.
        white: largest value of a pixel.
        exact: float32 between the passes and in the products, otherwise float16.
    """

    views: int
    channels: int
    side: int
    tile: int
    # a field, though it follows from `tile`: a property's value would not be in the text
    pixels: int
    across: int
    parts: int
    whole: bool
    waits: bool
    # an int, not a `Weights`: the text of a member would not change with its number
    resize: int
    linear_hue: bool
    white: int
    exact: bool
