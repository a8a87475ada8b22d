"""What every reader of image files returns, and the checks they share."""

from typing import NamedTuple

import numpy as np

from fastssl.errors import option

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: a quarter of a gigabyte of RGB


class Decoded(NamedTuple):
    """One decoded image file.

    Attributes:
        image_HWC: uint8 or uint16, upright, contiguous.
        plain: any other decoder shows these pixels too, even one that ignores EXIF and reads only baseline and
            progressive JPEG, 8-bit PNG (FFCV's and DALI's are such): the file's bytes may be passed on.
        alpha: the last channel is opacity.
        narrowed: the file holds more bits per sample than its reader returned.
        warnings: what the libraries reported, and what was left out, one sentence each.
    """

    image_HWC: np.ndarray
    plain: bool = False
    alpha: bool = False
    narrowed: bool = False
    warnings: tuple[str, ...] = ()


def check_size(height: int, width: int, max_pixels: int) -> None:
    """ValueError for a size that no image has, or that exceeds the limit."""
    if height < 1 or width < 1:
        raise ValueError(f"its header states {width}x{height} pixels")
    if height * width > max_pixels:
        fix = f"raise it with {option('max_pixels')} of `convert`"
        raise ValueError(f"its {width}x{height} pixels exceed the limit of {max_pixels}; {fix}")


def upright(image_HWC: np.ndarray, orientation: object) -> np.ndarray:
    """Undo an EXIF orientation: 2 to 4 mirror or turn in place, 5 to 8 exchange height and width, others do nothing."""
    if orientation not in range(2, 9):
        return image_HWC
    if orientation in (5, 6, 7, 8):
        image_HWC = image_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return np.ascontiguousarray(image_HWC)
