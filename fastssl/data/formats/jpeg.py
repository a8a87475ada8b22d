"""JPEG by libjpeg-turbo (simplejpeg); what it refuses with a warning, Pillow reads, unless the data end too early.

H W height and width in pixels.
"""

from collections.abc import Iterator

import numpy as np
import simplejpeg

from fastssl.data.formats import pillow
from fastssl.data.formats.decoded import MAX_PIXELS, Decoded, check_size, upright

START = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_APP1, _SCAN, _EOI = 0xE1, 0xDA, 0xD9
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)  # Huffman-coded frames; lossless and arithmetic ones are others
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ENDS_EARLY = "premature end of data segment"


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """A JPEG to (H, W, 1) or (H, W, 3) uint8, upright; ValueError where the data end before the picture does."""
    problem: ValueError | None = None
    try:
        _, _, colorspace = header(data, max_pixels=max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return pillow.decode(data, max_pixels=max_pixels)
        space = "GRAY" if colorspace.upper() == "GRAY" else "RGB"
        image_HWC = simplejpeg.decode_jpeg(data, colorspace=space)
    except ValueError as error:
        problem = error
    if problem is not None:
        return _decode_despite(problem, data, max_pixels=max_pixels)
    orientation, warnings = _orientation(data)
    plain = orientation == 1 and is_common(data)
    return Decoded(upright(image_HWC, orientation), plain=plain, warnings=warnings)


def _decode_despite(problem: ValueError, data: bytes, *, max_pixels: int) -> Decoded:
    """The pixels that Pillow shows of a file that libjpeg warns of."""
    text = str(problem)
    if _ENDS_EARLY in text:
        raise ValueError(f"the data end before the picture does ({text})")
    try:
        decoded = pillow.decode(data, max_pixels=max_pixels)
    except OSError:
        if not lacks_only_its_end(data):
            raise
        decoded = decode(data + _END, max_pixels=max_pixels)
    if "Premature end" in text:
        text = "the end marker of the JPEG is missing"
    return decoded._replace(plain=False, warnings=(*decoded.warnings, text))


def lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG of one scan holds every pixel and no end marker.

    Of several scans nobody can tell: a cut between two of them leaves a coarser picture that looks whole.
    """
    frame, scan = _payload(data, _FRAMES), _payload(data, {_SCAN})
    if frame is None or scan is None or frame[0] not in _SEQUENTIAL or len(frame[1]) < 6 or not scan[1]:
        return False
    if frame[1][5] != scan[1][0]:  # components of the frame and of its first scan
        return False
    try:
        simplejpeg.decode_jpeg(data + _END)
    except ValueError:
        return False
    return True


def header(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Height, width in pixels and color space ("RGB" | "YCbCr" | "Gray" | "CMYK" | "YCCK"), nothing decoded.

    Raises ValueError for bytes that do not begin a JPEG and for more than max_pixels.
    """
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, min_height=0, min_width=0)
    check_size(height, width, max_pixels)
    return height, width, colorspace


def is_plain(data: bytes) -> bool:
    """True when a decoder that ignores EXIF and knows only common JPEGs shows it rightly (FFCV's is one)."""
    return is_common(data) and _orientation(data)[0] == 1


def is_common(data: bytes) -> bool:
    """8-bit baseline, extended or progressive with Huffman codes: what every decoder reads."""
    frame = _payload(data, _FRAMES)
    if frame is None or frame[0] not in _SEQUENTIAL + _PROGRESSIVE or len(frame[1]) < 6:
        return False
    return frame[1][0] == 8 and frame[1][5] in (1, 3)


def decode_rgb(data: bytes | memoryview, *, fast_dct: bool = False) -> np.ndarray:
    """Decode a JPEG to (H, W, 3) uint8, EXIF ignored.

    fast_dct takes libjpeg-turbo's quick inverse transform, the one FFCV uses: equal pixels to FFCV's then.
    """
    header(data)
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=fast_dct)  # type: ignore[no-any-return]


def encode(image_HWC: np.ndarray, *, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 as a baseline JPEG with 4:2:0 color, (H, W, 1) as a gray one; quality 1..100."""
    gray = image_HWC.shape[2] == 1
    return simplejpeg.encode_jpeg(  # type: ignore[no-any-return]
        np.ascontiguousarray(image_HWC),
        quality=quality,
        colorspace="GRAY" if gray else "RGB",
        colorsubsampling="Gray" if gray else "420",
    )


def _orientation(data: bytes) -> tuple[int, tuple[str, ...]]:
    """EXIF orientation 1..8, 1 when the file states none or nonsense, and what Pillow warned of meanwhile."""
    tagged = any(
        data.startswith(b"Exif\0\0", start) or data.find(b"tiff:Orientation", start, end) >= 0
        for marker, start, end in _segments(data)
        if marker == _APP1
    )
    return pillow.orientation(data) if tagged else (1, ())


def _payload(data: bytes, markers: set[int]) -> tuple[int, bytes] | None:
    """The first segment with one of these markers: its marker and contents."""
    return next(((m, bytes(data[start:end])) for m, start, end in _segments(data) if m in markers), None)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, last byte + 1) of the contents of each segment up to the first scan's header."""
    at = 2
    while at >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            at = data.find(b"\xff", at + 1)  # bytes between segments, fill bytes, markers without contents
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, at + 2 + length
        if marker in (_SCAN, _EOI):
            return
        at += 2 + max(2, length)
