"""Encoded bytes to pixels: JPEG by libjpeg-turbo (simplejpeg), everything else by Pillow.

Only formats that are pictures and nothing more are opened (no EPS, no PDF: Pillow would start other programs
for them), and the size that the header states is checked before a single pixel is decoded.

H W height and width in pixels, C channels.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: a quarter of a gigabyte of RGB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
JPEG_START = b"\xff\xd8\xff"
EXIF_ORIENTATION = 0x0112


def decode_image(data: bytes, *, key: str, channels: int | None = None) -> np.ndarray:
    """Decode one image file, turned upright as its EXIF orientation says, first frame of several.

    Args:
        data: the whole encoded file.
        key: name of the item, for the error's sentence.
        channels: C wanted: 1 turns color to gray, 3 repeats gray and drops alpha; None keeps the file's own.

    Returns:
        image_HWC: uint8, or uint16 when the file holds 16 bits and Pillow keeps them (gray PNG and TIFF;
        it narrows 16-bit color to 8).

    Raises:
        ValueError: one plain sentence, when the bytes are no readable image or exceed MAX_PIXELS.
    """
    try:
        image_HWC = _decode_plain_jpeg(data) if data[:3] == JPEG_START else None
        if image_HWC is None:
            image_HWC = _decode_pillow(data)
    except Exception as error:  # decoders raise nearly everything on hostile bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{key!r} cannot be read as an image: {reason}") from error
    return image_HWC if channels is None else to_channels(image_HWC, channels, key=key)


def to_channels(image_HWC: np.ndarray, channels: int, *, key: str) -> np.ndarray:
    """Gray to color by repetition, color to gray by ITU-R 601 luma, four channels to three by dropping one.

    Returns an image of `channels` channels and the same dtype; raises ValueError when there is no such rule.
    """
    have = image_HWC.shape[2]
    if have == channels:
        return image_HWC
    if have in (3, 4) and channels == 1:
        luma_HW = image_HWC[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return np.rint(luma_HW).astype(image_HWC.dtype)[..., None]
    if have in (1, 2) and channels == 3:
        return np.repeat(image_HWC[..., :1], 3, axis=2)
    if have in (2, 4) and channels == have - 1:
        return np.ascontiguousarray(image_HWC[..., :channels])
    raise ValueError(f"{key!r} has {have} channels; it cannot be turned into {channels}")


def jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    """Height, width in pixels and color space ("RGB" | "YCbCr" | "Gray" | "CMYK" | "YCCK"), nothing decoded.

    Raises ValueError for bytes that do not begin a JPEG and for more than MAX_PIXELS.
    """
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, min_height=0, min_width=0)
    _check_size(height, width)
    return height, width, colorspace


def jpeg_is_plain(data: bytes) -> bool:
    """True when a decoder that ignores EXIF and knows only gray and RGB shows it rightly (FFCV's is one)."""
    return jpeg_header(data)[2] not in ("CMYK", "YCCK") and _orientation(data) == 1


def decode_jpeg(data: bytes | memoryview, *, fast_dct: bool = False) -> np.ndarray:
    """Decode a JPEG to (H, W, 3) uint8, EXIF ignored.

    fast_dct takes libjpeg-turbo's quick inverse transform, the one FFCV uses: equal pixels to FFCV's then.
    """
    jpeg_header(data)
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast_dct)  # type: ignore[no-any-return]


def encode_jpeg(image_HWC: np.ndarray, *, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 as a baseline JPEG with 4:2:0 color; quality 1..100."""
    image_HWC = np.ascontiguousarray(image_HWC)
    return simplejpeg.encode_jpeg(image_HWC, quality=quality, colorspace="RGB", colorsubsampling="420")  # type: ignore[no-any-return]


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


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """The fast road for gray and color JPEG; None where only Pillow knows the color space."""
    _, _, colorspace = jpeg_header(data)
    if colorspace in ("CMYK", "YCCK"):
        return None
    image_HWC = simplejpeg.decode_jpeg(data, colorspace="GRAY" if colorspace.upper() == "GRAY" else "RGB")
    orientation = _orientation(data)
    return image_HWC if orientation == 1 else _upright(image_HWC, orientation)


def _decode_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        _check_size(opened.height, opened.width)
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "PA" else "RGB")
        elif picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa"):
            picture = picture.convert("RGB")
        elif picture.mode == "1":
            picture = picture.convert("L")
        image = np.asarray(picture)
    return _as_hwc(image)


def _as_hwc(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) of Pillow's dtypes to (H, W, C) uint8 or uint16; ValueError where range is lost."""
    if image.dtype in (np.dtype(np.int32), np.dtype(">u2"), np.dtype("<u2")) and image.dtype != np.uint16:
        if image.size and (image.min() < 0 or image.max() > 65535):
            raise ValueError("its samples do not fit 16 bits")
        image = image.astype(np.uint16)
    if image.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(f"its samples are {image.dtype}, not 8 or 16 bit integers")
    return np.ascontiguousarray(image if image.ndim == 3 else image[..., None])


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"its header states {width}x{height} pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"its {width}x{height} pixels exceed the limit of {MAX_PIXELS}")


def _orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of a JPEG; 1 when it states none or nonsense."""
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            value = opened.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _upright(image_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2..4 mirror or turn in place, 5..8 exchange height and width."""
    if orientation >= 5:
        image_HWC = image_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return np.ascontiguousarray(image_HWC)
