"""The parallel part of a conversion: a run of items becomes a run of samples as they will be stored.

H W height and width in pixels, C channels.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import Literal

import numba
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastssl.data.decode import Color, decode, over_background, to_channels, with_left_out
from fastssl.data.formats import jpeg
from fastssl.data.formats.decoded import MAX_PIXELS, Decoded
from fastssl.data.limits import MAX_SIDE_PX
from fastssl.data.resize import resize, shrink
from fastssl.data.sources.base import Item
from fastssl.runs import numba_cache

FULL_BYTES = 64 << 20  # of pixels in one run, whatever the guess that chose its items
_PIECE_BYTES, _LARGE_BYTES = 1 << 20, 1 << 16
Mode = Literal["raw", "jpg", "smart"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What every stored image has to be.

    Attributes:
        side_px: height and width of all; None keeps each image's own.
        max_side_px: the longer side at most, where side_px is None.
        channels: C.
        dtype: "uint8" or "uint16"; images of the other are scaled to it.
        mode: "raw" pixels, "jpg" JPEG, "smart" JPEG for images of more than `smart_bytes` of pixels.
        quality: of JPEGs encoded here; those that need no change are passed through.
        encoded: raw images leave as files (their own where nothing changed, else PNG) rather than as pixels.
        max_pixels: images whose header states more are refused.
        background: color, 0 to 255, beneath transparent pixels; None leaves what the file hides there.
        stretch: value of 16-bit images that becomes the largest of `dtype`; None takes 65535.
    """

    side_px: int | None = None
    max_side_px: int | None = None
    channels: int = 3
    dtype: str = "uint8"
    mode: Mode = "raw"
    quality: int = 90
    smart_bytes: int = 1 << 16
    encoded: bool = False
    max_pixels: int = MAX_PIXELS
    background: Color | None = None
    stretch: int | None = None


@dataclasses.dataclass(slots=True)
class Run:
    """Prepared samples of one run of items, and what they add to the channel statistics.

    Attributes:
        sums_2C: sum of pixel values and of their squares, by channel; a run is far too short to overflow.
        data: as it will be stored: pixels (H, W, C) or the bytes of a file.
        sizes: (height, width) of each.
        labels, keys: of each.
        refused: (key, reason) of items that could not be read.
        warnings: (key, text) of what was noticed of items that were read.
        deep_count: images of 16 bits.
        deep_peak: their largest value, before any scaling.
        pixels: number of pixels summed.
        pixel_bytes: of the same pixels, decoded.
        rest: the items that were left when the run was full; they may turn out to be none.
    """

    sums_2C: NDArray[np.int64]
    data: list[np.ndarray | bytes] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    labels: list[int | str] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    refused: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    warnings: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    deep_count: int = 0
    deep_peak: int = 0
    pixels: int = 0
    pixel_bytes: int = 0
    rest: Iterator[Item] | None = None


def prepare(items: Iterator[Item], shape: Shape) -> Run:
    """Decode, fit and encode items in order until the run is full; what cannot be read goes to `refused`."""
    run = Run(np.zeros((2, shape.channels), np.int64))
    for piece in joined(_fill(run, items, shape)):
        values = np.frombuffer(piece, shape.dtype)
        values.flags.writeable = False  # as those of joined bytes are: the kernel is compiled for one kind
        _add_moments(values, run.sums_2C)
        run.pixels += len(values) // shape.channels
    return run


def _fill(run: Run, items: Iterator[Item], shape: Shape) -> Iterator[np.ndarray]:
    """Append prepared items to the run until it is full; yields their pixels."""
    for item in items:
        try:
            decoded = _decode(item, shape)
            image_HWC, stored = _prepare_one(item, decoded, shape)
        except ValueError as error:
            run.refused.append((item.key, str(error)))
            continue
        _note(run, item, decoded, shape)
        run.pixel_bytes += image_HWC.nbytes
        run.data.append(stored)
        run.sizes.append(image_HWC.shape[:2])
        run.labels.append(item.label)
        run.keys.append(item.key)
        yield image_HWC
        if run.pixel_bytes > FULL_BYTES:
            run.rest = items
            return


def joined(parts: Iterable[np.ndarray | bytes]) -> Iterator[memoryview | bytes]:
    """The same bytes in pieces of up to about 1 MiB: a call for each small part would cost more than the work on it.

    Parts are contiguous; those that are large already are handed on as they are.
    """
    held: list[memoryview | bytes] = []
    size = 0
    for part in parts:
        plain = part.data if isinstance(part, np.ndarray) else part
        length = memoryview(plain).nbytes
        if held and (length >= _LARGE_BYTES or size + length > _PIECE_BYTES):
            yield b"".join(held)
            held, size = [], 0
        if length >= _LARGE_BYTES:
            yield plain
        else:
            held.append(plain)
            size += length
    if held:
        yield b"".join(held)


def _note(run: Run, item: Item, decoded: Decoded, shape: Shape) -> None:
    """Add what the account of a conversion says of an image that was read."""
    run.warnings += [(item.key, text) for text in decoded.warnings]
    if decoded.image_HWC.dtype == np.uint16:
        peak = int(decoded.image_HWC.max(initial=0))
        run.deep_count, run.deep_peak = run.deep_count + 1, max(run.deep_peak, peak)
        if shape.stretch is not None and peak > shape.stretch:
            run.warnings.append((item.key, f"values above {shape.stretch}, the stretch, are cut"))


def _decode(item: Item, shape: Shape) -> Decoded:
    data = item.data
    if isinstance(data, Exception):
        raise data if isinstance(data, ValueError) else ValueError(str(data))
    if isinstance(data, np.ndarray):
        return _from_pixels(data, item.key, shape)
    decoded = decode(
        data, key=item.key, channels=shape.channels, max_pixels=shape.max_pixels, background=shape.background
    )
    if decoded.narrowed and shape.dtype == "uint16":
        raise ValueError(
            f"{item.key!r} holds more than 8 bits per sample, of which its reader gives 8; set dtype to uint8"
        )
    return decoded


def _from_pixels(pixels: np.ndarray, key: str, shape: Shape) -> Decoded:
    """Pixels (H, W, C) that a source holds as they are; with a background, a second or fourth channel is opacity."""
    if not pixels.size:
        raise ValueError(f"{key!r} has no pixels: its shape is {pixels.shape}")
    image_HWC = np.ascontiguousarray(pixels)
    if shape.background is not None and image_HWC.shape[2] in (2, 4) and shape.channels in (1, 3):
        image_HWC = over_background(image_HWC, shape.background)
    decoded = with_left_out(Decoded(image_HWC), shape.channels)
    return decoded._replace(image_HWC=to_channels(image_HWC, shape.channels, key=key))


def _prepare_one(item: Item, decoded: Decoded, shape: Shape) -> tuple[np.ndarray, np.ndarray | bytes]:
    """The image's pixels and what to store of it."""
    data, image_HWC = item.data, decoded.image_HWC
    if image_HWC.size > MAX_SIDE_PX and max(image_HWC.shape) > MAX_SIDE_PX and not (shape.side_px or shape.max_side_px):
        raise ValueError(f"{item.key!r} is {image_HWC.shape[1]}x{image_HWC.shape[0]}, longer than {MAX_SIDE_PX}")
    fitted_HWC = fit(scale_range(image_HWC, shape), shape)
    if fitted_HWC.shape[0] * fitted_HWC.shape[1] > MAX_PIXELS:  # the limit that loaders keep
        raise ValueError(f"{item.key!r} has more than {MAX_PIXELS} pixels; set side_px or max_side_px")
    as_jpeg = shape.mode == "jpg" or (shape.mode == "smart" and fitted_HWC.nbytes > shape.smart_bytes)
    if not as_jpeg and not shape.encoded:
        return fitted_HWC, fitted_HWC
    unchanged = fitted_HWC is image_HWC and decoded.plain
    if unchanged and isinstance(data, bytes) and (data.startswith(jpeg.START) or not as_jpeg):
        return fitted_HWC, data
    return fitted_HWC, _encode(fitted_HWC, shape, as_jpeg=as_jpeg)


def _encode(image_HWC: np.ndarray, shape: Shape, *, as_jpeg: bool) -> bytes:
    if as_jpeg:
        return jpeg.encode(image_HWC, quality=shape.quality)
    file = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if shape.channels == 1 else image_HWC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def fit(image_HWC: np.ndarray, shape: Shape) -> np.ndarray:
    """To side_px or below max_side_px; the very same array where nothing has to change."""
    if shape.side_px is not None:
        same = image_HWC.shape[0] == image_HWC.shape[1] == shape.side_px
        return image_HWC if same else resize(image_HWC, shape.side_px)
    return image_HWC if shape.max_side_px is None else shrink(image_HWC, shape.max_side_px)


def scale_range(image_HWC: np.ndarray, shape: Shape) -> np.ndarray:
    """uint16 to uint8 by rounding 65535 -> 255, uint8 to uint16 by 257: both ends of the range stay ends.

    With a stretch, that value of a uint16 image takes the place of 65535, and larger ones are cut to it.
    """
    top = shape.stretch or 65535
    if image_HWC.dtype == np.uint16 and (shape.dtype == "uint8" or top != 65535):
        full = np.iinfo(shape.dtype).max
        values = np.minimum(image_HWC, top).astype(np.uint64)
        scaled_HWC: np.ndarray = ((values * full * 2 + top) // (2 * top)).astype(shape.dtype)
        return scaled_HWC
    if image_HWC.dtype == np.dtype(shape.dtype):
        return image_HWC
    if shape.dtype == "uint16" and image_HWC.dtype == np.uint8:
        return image_HWC.astype(np.uint16) * np.uint16(257)
    raise ValueError(f"pixels of {image_HWC.dtype} are neither uint8 nor uint16")


@numba_cache.locked
@numba.njit(cache=True, nogil=True)
def _add_moments(values: np.ndarray, sums_2C: np.ndarray) -> None:
    """Add the sum and the sum of squares of each channel, exactly; channels are innermost in `values`."""
    channels = sums_2C.shape[1]
    columns_2X = np.zeros((2, 64 * channels), np.uint64)  # whole rows of them: the compiler makes vectors of it
    rest = len(values) % columns_2X.shape[1]
    for row in values[: len(values) - rest].reshape(-1, 64 * channels):
        for x in range(len(row)):
            value = np.uint64(row[x])
            columns_2X[0, x] += value
            columns_2X[1, x] += value * value
    for x in range(rest):
        value = np.uint64(values[len(values) - rest + x])
        columns_2X[0, x] += value
        columns_2X[1, x] += value * value
    for x in range(columns_2X.shape[1]):
        sums_2C[0, x % channels] += np.int64(columns_2X[0, x])
        sums_2C[1, x % channels] += np.int64(columns_2X[1, x])
