"""Images brought to a size: a center square, or a longest side.

H W height and width in pixels, C channels.
"""

import numpy as np
from PIL import Image


def resize(image_HWC: np.ndarray, side_px: int) -> np.ndarray:
    """Shorter side to side_px (antialiased), then the center square: (side_px, side_px, C), same dtype."""
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    top, left = (height - short) / 2, (width - short) / 2
    return _resample(image_HWC, (side_px, side_px), box=(left, top, left + short, top + short))


def shrink(image_HWC: np.ndarray, max_side_px: int) -> np.ndarray:
    """Longer side to at most max_side_px, aspect kept; a smaller image is returned as it is."""
    height, width = image_HWC.shape[:2]
    scale = max_side_px / max(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    return _resample(image_HWC, size, box=(0, 0, width, height))


def _resample(image_HWC: np.ndarray, size: tuple[int, int], *, box: tuple[float, float, float, float]) -> np.ndarray:
    """Antialiased bicubic to size (height, width) from box (left, top, right, bottom), channel by channel."""
    height, width = size
    if image_HWC.shape[:2] == size and box == (0, 0, width, height):
        return image_HWC
    # four channels go one by one: Pillow would weigh the first three by the fourth as if it were alpha
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] == 3:
        picture = Image.fromarray(np.ascontiguousarray(image_HWC))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
    planes = [np.ascontiguousarray(image_HWC[..., c], dtype=np.float32) for c in range(image_HWC.shape[2])]
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box=box))
        for plane in planes
    ]
    top = np.iinfo(image_HWC.dtype).max
    return np.rint(np.stack(planes, axis=2)).clip(0, top).astype(image_HWC.dtype)
