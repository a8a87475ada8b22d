"""TIFF: pages and bands beyond what Pillow shows, by tifffile (the extra `tiff`).

H W height and width in pixels, C channels.
"""

import importlib.util
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from fastssl.data.formats import pillow
from fastssl.data.formats.decoded import Decoded, check_size, upright
from fastssl.data.library_warnings import collected
from fastssl.data.limits import MAX_CHANNELS

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _BANDS, _PLANAR = 256, 257, 258, 274, 277, 284
_PHOTOMETRIC, _EXTRA_BANDS, _SAMPLE_FORMAT = 262, 338, 339
_UNSIGNED, _OPACITY, _WHITE_IS_ZERO = 1, (1, 2), 0
_PLAIN_SAMPLES = (0, 1, 2)  # gray and RGB; the others (palette, CMYK, YCbCr, Lab) need Pillow to become RGB


class _Layout(NamedTuple):
    """What the first page's tags say of it.

    Attributes:
        bands: samples per pixel.
        plain: the samples are gray, RGB or further bands as they are stored.
        for_pillow: Pillow may know it with all its bits.
        black: gray value of black where zero is white, else None.
    """

    bands: int
    plain: bool
    for_pillow: bool
    black: int | None


def decode(data: bytes, *, max_pixels: int, channels: int | None) -> Decoded:
    """A TIFF as one image.

    The first page is the image, except where its bands times the number of pages are the channels wanted and those
    are neither 1 nor 3: then the pages lie one behind the other in C.

    Args:
        channels: C wanted, None takes the first page's own.
    """
    with collected() as warnings:
        layout = _layout(data, max_pixels)
        with collected():  # what is reported here is reported again by whoever reads the page
            pages = _page_count(data) if channels is not None else 1
        stacked = channels not in (1, 3) and pages > 1 and layout.bands * pages == channels
        decoded = [_page(data, i, layout, max_pixels=max_pixels) for i in range(pages if stacked else 1)]
    if stacked and len({page.image_HWC.shape for page in decoded}) > 1:
        raise ValueError(f"its {pages} pages differ in size or number of bands")
    if pages > 1 and not stacked:
        warnings.append(pillow.FIRST_FRAME)
    for page in decoded:
        warnings.extend(page.warnings)
    image_HWC = np.concatenate([page.image_HWC for page in decoded], axis=2) if stacked else decoded[0].image_HWC
    return decoded[0]._replace(
        image_HWC=image_HWC, alpha=decoded[0].alpha and not stacked, warnings=tuple(dict.fromkeys(warnings))
    )


def _layout(data: bytes, max_pixels: int) -> _Layout:
    tags = _tags(data)
    bands = int(tags.get(_BANDS, 1))
    if not 1 <= bands <= MAX_CHANNELS:
        raise ValueError(f"its header states {bands} bands")
    height, width = int(tags.get(_HEIGHT, 0)), int(tags.get(_WIDTH, 0))
    check_size(height, width, max_pixels)
    check_size(height * -(-bands // 4), width, max_pixels)  # as much memory as RGBA may take
    formats = {int(value) for value in tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))}
    if formats != {_UNSIGNED}:
        raise ValueError("its samples are signed, floating point or complex, not 8 or 16 bit unsigned integers")
    bits = {int(value) for value in tags.get(_BITS, (1,))}
    extra = tuple(tags.get(_EXTRA_BANDS, ()))
    known = bands == 1 or (bands <= 4 and bits == {8}) or (bits == {16} and int(tags.get(_PLANAR, 1)) == 1)
    unnamed = bands == 4 and bits == {16} and bool(extra) and extra[0] not in _OPACITY
    photometric = int(tags.get(_PHOTOMETRIC, 1))
    plain = photometric in _PLAIN_SAMPLES
    is_gray = bands == 1 or (bands == 2 and extra[:1] in {(kind,) for kind in _OPACITY})
    black = (1 << max(bits)) - 1 if photometric == _WHITE_IS_ZERO and is_gray else None
    return _Layout(bands, plain, not plain or (known and bands <= 4 and not unnamed), black)


def _page(data: bytes, index: int, layout: _Layout, *, max_pixels: int) -> Decoded:
    """One page by whichever library shows all of it."""
    if layout.for_pillow:
        try:
            decoded = pillow.decode(data, max_pixels=max_pixels, frame=index)
        except (OSError, ValueError):
            if not layout.plain or not _has_tifffile():
                raise
        else:
            shows_all = decoded.image_HWC.shape[2] >= layout.bands and not decoded.narrowed
            if shows_all or not layout.plain or (decoded.narrowed and not _has_tifffile()):
                is_deep = decoded.image_HWC.dtype == np.uint16  # Pillow inverts 8 bits only
                return decoded._replace(image_HWC=_inverted(decoded.image_HWC, layout)) if is_deep else decoded
    tifffile = _tifffile(layout.bands)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[index]
        check_size(page.imagelength, page.imagewidth, max_pixels)
        image = page.asarray(maxworkers=1)
    axes = page.axes.replace("S", "C")
    if axes not in ("YX", "YXC", "CYX"):
        raise ValueError(f"its axes are {page.axes}, not rows, columns and bands")
    image_HWC = _inverted(pillow.as_hwc(image.transpose(1, 2, 0) if axes == "CYX" else image), layout)
    tag = page.tags.get(_ORIENTATION)
    alpha = image_HWC.shape[2] in (2, 4) and bool(page.extrasamples) and page.extrasamples[-1] in _OPACITY
    return Decoded(upright(image_HWC, int(tag.value) if tag else 1), alpha=alpha)


def _inverted(image_HWC: np.ndarray, layout: _Layout) -> np.ndarray:
    """Gray with zero for black, whatever the file takes for it; opacity stays."""
    if layout.black is None:
        return image_HWC
    gray_HW1 = image_HWC.dtype.type(layout.black) - image_HWC[..., :1]
    return np.concatenate([gray_HW1, image_HWC[..., 1:]], axis=2)


def _tags(data: bytes) -> Any:
    """Tags of the first page, whether or not Pillow knows what to make of its samples."""
    wide = data[2:3] == b"+" or data[3:4] == b"+"
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if wide else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _page_count(data: bytes) -> int:
    try:
        with pillow.open_image(data) as picture:
            return int(getattr(picture, "n_frames", 1))
    except ValueError:  # samples that Pillow does not know
        if not _has_tifffile():
            return 1
        with _tifffile(1).TiffFile(io.BytesIO(data)) as file:
            return len(file.pages)


def _has_tifffile() -> bool:
    return importlib.util.find_spec("tifffile") is not None


def _tifffile(bands: int) -> Any:
    try:
        return importlib.import_module("tifffile")
    except ImportError as error:
        what = f"its {bands} bands need" if bands > 4 else "this kind of TIFF needs"
        raise ValueError(f"{what} tifffile; install it with: pip install 'fastssl-vision[tiff]'") from error
