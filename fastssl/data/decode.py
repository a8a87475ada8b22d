"""Encoded bytes to pixels: the one door to the readers of image files, whose every error becomes one sentence.

H W height and width in pixels, C channels.
"""

import re

import numpy as np
from PIL import ImageColor

from fastssl.data.formats import jpeg, pillow, tiff
from fastssl.data.formats.decoded import MAX_PIXELS, Decoded
from fastssl.errors import UserError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
Color = tuple[int, int, int]


def decode(
    data: bytes,
    *,
    key: str,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    background: Color | None = None,
) -> Decoded:
    """Decode one image file, turned upright as its EXIF orientation says, first frame of several.

    Args:
        data: the whole encoded file.
        key: name of the item, for the error's sentence.
        channels: C wanted: 1 turns color to gray, 3 repeats gray and drops opacity; None keeps the file's own.
        max_pixels: the most that the header may state.
        background: color, 0 to 255, to put beneath transparent pixels; None leaves what the file hides there.

    Returns:
        The image, uint8, or uint16 when the file holds more than 8 bits per sample, and what was noticed on the way.

    Raises:
        ValueError: one plain sentence, when the bytes are no readable image or exceed max_pixels.
    """
    try:
        if data.startswith(jpeg.START):
            decoded = jpeg.decode(data, max_pixels=max_pixels)
        elif data[:4] in tiff.STARTS:
            decoded = tiff.decode(data, max_pixels=max_pixels, channels=channels)
        else:
            decoded = pillow.decode(data, max_pixels=max_pixels)
    except Exception as error:  # decoders raise nearly everything on hostile bytes
        raise ValueError(f"{key!r} cannot be read as an image: {reason(error)}") from error
    if decoded.alpha:
        decoded = _without_opacity(decoded, channels, background)
    if channels is None:
        return decoded
    decoded = decoded if decoded.alpha else with_left_out(decoded, channels)
    is_subset = decoded.image_HWC.shape[2] <= channels  # else the file holds what is left out here
    image_HWC = to_channels(decoded.image_HWC, channels, key=key)
    return decoded._replace(image_HWC=image_HWC, plain=decoded.plain and is_subset)


def decode_image(data: bytes, *, key: str, channels: int | None = None) -> np.ndarray:
    """The pixels (H, W, C) alone of `decode`."""
    return decode(data, key=key, channels=channels).image_HWC


def reason(error: BaseException) -> str:
    """What an error says, as one line without addresses in memory; its type where it says nothing."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "it", " ".join(str(error).split()))[:200].rstrip(".")
    if isinstance(error, LookupError | MemoryError | AttributeError | TypeError) or not text:
        return f"{type(error).__name__} {text}".strip()  # "3" or "'BitsPerSample'" alone says nothing
    return text


def to_channels(image_HWC: np.ndarray, channels: int, *, key: str) -> np.ndarray:
    """Gray to color by repetition, color to gray by ITU-R 601 luma, four channels to three by dropping one.

    Returns an image of `channels` channels and the same dtype; raises ValueError when there is no such rule.
    """
    have = image_HWC.shape[2]
    if have == channels:
        return image_HWC
    if have in (3, 4) and channels == 1:
        luma_HW = image_HWC[..., :3].astype(np.float32) @ _LUMA
        luma_HW1: np.ndarray = np.rint(luma_HW).astype(image_HWC.dtype)[..., None]
        return luma_HW1
    if have in (1, 2) and channels == 3:
        return np.repeat(image_HWC[..., :1], 3, axis=2)
    if have in (2, 4) and channels == have - 1:
        return np.ascontiguousarray(image_HWC[..., :channels])
    raise ValueError(f"{key!r} has {have} channels; it cannot be turned into {channels}")


def with_left_out(decoded: Decoded, channels: int) -> Decoded:
    """With a warning where `to_channels` leaves out a last channel that is not opacity."""
    have = decoded.image_HWC.shape[2]
    if have not in (2, 4) or channels not in (1, 3):
        return decoded
    text = f"the last of {have} channels is left out; --channels {have} keeps it"
    return decoded._replace(warnings=(*decoded.warnings, text))


def over_background(image_HWC: np.ndarray, background: Color) -> np.ndarray:
    """Gray or color with opacity as its last channel, put over a color of 0 to 255: (H, W, 3), same dtype."""
    top = np.iinfo(image_HWC.dtype).max
    opacity_HW1 = image_HWC[..., -1:].astype(np.float32) / top
    color_HWC = np.broadcast_to(image_HWC[..., :-1], (*image_HWC.shape[:2], 3))
    below_3 = np.array(background, np.float32) * (top / 255)
    over_HWC: np.ndarray = np.rint(color_HWC * opacity_HW1 + below_3 * (1 - opacity_HW1)).astype(image_HWC.dtype)
    return over_HWC


def parse_color(text: str) -> Color:
    """A name ("white"), #rrggbb or rgb(r, g, b) as numbers of 0 to 255; UserError for anything else."""
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError) as error:  # the latter for what is no text
        raise UserError(f"background is {text!r}.", "Set it to a color such as white, black or #808080.") from error
    return red, green, blue


def _without_opacity(decoded: Decoded, channels: int | None, background: Color | None) -> Decoded:
    """Over the background where there is one; else as it is, with a warning where transparent pixels come to light."""
    if background is not None:
        return decoded._replace(image_HWC=over_background(decoded.image_HWC, background), alpha=False)
    opacity_HW = decoded.image_HWC[..., -1]
    if channels not in (1, 3) or opacity_HW.min(initial=255) == np.iinfo(opacity_HW.dtype).max:
        return decoded
    text = "transparent pixels show the color stored beneath them; --background gives them one"
    return decoded._replace(warnings=(*decoded.warnings, text))
