"""Image files by Pillow, upright, with all their bits where Pillow itself would narrow 16-bit color to 8.

Only formats that are pictures and nothing more are opened (no EPS, no PDF: Pillow would start other programs for
them), and the size that the header states is checked before a single pixel is decoded.

H W height and width in pixels, C channels.
"""

import io
import re
import struct
import sys

import numpy as np
from PIL import Image, ImageFile

from fastssl.data.formats.decoded import Decoded, check_size, upright
from fastssl.data.library_warnings import collected

FORMATS = ("PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "JPEG")
FIRST_FRAME = "only the first of several frames is read"
_ORIENTATION = 0x0112  # EXIF's tag
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


def decode(data: bytes, *, max_pixels: int, frame: int | None = None) -> Decoded:
    """One frame of an image file; the first, with a warning where there are others, unless `frame` says which."""
    with collected() as warnings, open_image(data) as picture:
        check_size(picture.height, picture.width, max_pixels)
        if frame is None and getattr(picture, "is_animated", False):
            warnings.append(FIRST_FRAME)
        if frame:
            picture.seek(frame)
            check_size(picture.height, picture.width, max_pixels)
        is_common = picture.format == "PNG" and picture.mode in ("L", "RGB", "P")
        image, narrowed = _deep_samples(picture, data, frame or 0)
        picture.load()
        turn = _turn(picture)
        samples, alpha = _in_samples(picture)
        image_HWC = as_hwc(np.asarray(samples) if image is None else image)
        if image_HWC.dtype == np.uint16 and "transparency" in picture.info:
            image_HWC, alpha = _with_opacity(image_HWC, picture.info["transparency"]), True
        image_HWC = upright(image_HWC, turn)
        alpha = alpha and image_HWC.shape[2] in (2, 4)
        plain = is_common and image is None and turn == 1 and not (alpha or narrowed or warnings)
        return Decoded(image_HWC, plain=plain, alpha=alpha, narrowed=narrowed, warnings=tuple(warnings))


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The file with its header read, whatever the size it states.

    Not `Image.open`, whose limit on pixels is one for the whole process, and whose error names an object in memory.

    Raises ValueError when the file is of no supported type or its header is damaged.
    """
    Image.init()
    problem = "unsupported file type"
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None:
            continue
        verdict = accept(data[:16])
        if isinstance(verdict, str):  # a codec that this Pillow was built without
            problem = verdict
        elif verdict:
            try:
                picture: ImageFile.ImageFile = factory(io.BytesIO(data), "")
                return picture
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                problem = f"damaged {name} header ({error})"
    raise ValueError(problem)


def orientation(data: bytes) -> tuple[int, tuple[str, ...]]:
    """EXIF orientation 1..8 of a JPEG, 1 when it states none or nonsense, and what Pillow warned of."""
    with collected() as warnings:
        try:
            with open_image(data) as picture:
                turn = _turn(picture)
        except Exception:
            turn = 1
    return turn, tuple(warnings)


def as_hwc(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) of any integer type to (H, W, C) uint8 or uint16; ValueError where range is lost."""
    if image.dtype != np.uint8 and image.dtype.kind in "iu":
        if image.size and (image.min() < 0 or image.max() > 65535):
            raise ValueError("its samples do not fit 16 bits")
        image = image.astype(np.uint16)
    if image.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(f"its samples are {image.dtype}, not 8 or 16 bit integers")
    return np.ascontiguousarray(image if image.ndim == 3 else image[..., None])


def _turn(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises nearly everything on damaged EXIF, which leaves the pixels as they are
        return 1
    return value if isinstance(value, int) and value in range(1, 9) else 1


def _in_samples(picture: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in a mode whose samples are gray, color or opacity, and whether the last is opacity."""
    mode = picture.mode
    if mode in ("RGBA", "LA"):
        return picture, True
    if mode in ("RGBa", "La", "PA") or (mode == "P" and "transparency" in picture.info):
        return picture.convert("LA" if mode == "La" else "RGBA"), True
    if mode in ("1", "L", "RGB") and "transparency" in picture.info:  # one color or gray that is transparent
        return picture.convert("RGBA" if mode == "RGB" else "LA"), True
    if mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
        return picture.convert("RGB"), False
    return (picture.convert("L"), False) if mode == "1" else (picture, False)


def _with_opacity(image_HWC: np.ndarray, transparent: object) -> np.ndarray:
    """16-bit gray or color with opacity behind it: 0 where the samples are those of the transparent color."""
    is_clear_HW1 = (image_HWC == np.array(transparent)).all(axis=2, keepdims=True)
    return np.concatenate([image_HWC, np.where(is_clear_HW1, 0, 65535).astype(np.uint16)], axis=2)


def _deep_samples(picture: ImageFile.ImageFile, data: bytes, frame: int) -> tuple[np.ndarray | None, bool]:
    """uint16 samples of a file whose color has more than 8 bits, or None; whether Pillow loses some of them."""
    if not picture.tile:
        return None, False
    decoder, _, offset, args = picture.tile[0]
    words = (args,) if isinstance(args, str) else tuple(args or ("",))
    rawmode = str(words[0])
    if picture.format == "PPM" and picture.mode == "RGB":
        maximum = int(words[1]) if decoder.startswith("ppm") else 255
        if maximum <= 255:
            return None, False
        return (None, True) if decoder == "ppm_plain" else (_ppm(picture, data, offset, maximum), False)
    if re.fullmatch(r"RGBA?;16[LBN]", rawmode):
        high = np.asarray(picture)
        low = _with_rawmode(data, frame, rawmode[:-1] + _OTHER_BYTE[rawmode[-1]])
        return (high.astype(np.uint16) << 8) | low, False
    if rawmode == "LA;16B":
        return _with_rawmode(data, frame, "RGBA").view(">u2"), False
    return None, (";16" in rawmode and not picture.mode.startswith("I")) or _states_many_bits(picture, data)


def _with_rawmode(data: bytes, frame: int, rawmode: str) -> np.ndarray:
    """The samples as Pillow unpacks them by another rule: its 16-bit rules keep one byte, each of them another."""
    with open_image(data) as picture:
        picture.seek(frame)
        picture.tile = [
            tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
            for tile in picture.tile
        ]
        return np.asarray(picture)


def _ppm(picture: ImageFile.ImageFile, data: bytes, offset: int, maximum: int) -> np.ndarray:
    """Binary 16-bit color, scaled as Pillow scales gray."""
    shape = (picture.height, picture.width, 3)
    if len(data) - offset < 2 * int(np.prod(shape)):
        raise ValueError("the data end before the picture does")
    values = np.frombuffer(data, ">u2", int(np.prod(shape)), offset).reshape(shape)
    if maximum == 65535:
        return values
    return np.rint(values.astype(np.float64) / maximum * 65535).clip(0, 65535).astype(np.uint16)


def _states_many_bits(picture: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether JPEG 2000 or AVIF, which Pillow gives as 8 bits in color, holds more."""
    if picture.format == "JPEG2000" and not picture.mode.startswith("I"):
        at = data.find(b"\xff\x4f\xff\x51")  # start of the codestream, its size segment
        return 0 <= at < len(data) - 42 and (data[at + 42] & 0x7F) > 7
    if picture.format == "AVIF":
        at = data.find(b"av1C")
        return 0 <= at < len(data) - 6 and bool(data[at + 6] & 0x40)
    return False
