"""Writes FFCV's `.beton` file as a stream, in numpy alone: one page in memory, whatever the number of samples.

C channels, H W height and width in pixels.
"""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import numpy as np

from fastssl.data.beton.format import (
    FIELD,
    HEADER,
    INT,
    JPG,
    MAX_PAGE,
    NDARRAY,
    RAW,
    RGB,
    TABLE,
    VERSION,
    pack_ndarray,
    record_type,
)
from fastssl.data.decode import decode_image
from fastssl.data.formats import jpeg
from fastssl.data.limits import MAX_SIDE_PX
from fastssl.data.resize import shrink
from fastssl.data.storage import writing
from fastssl.errors import UserError
from fastssl.runs.files import put_in_place, remove, temporary_name

Mode = Literal["raw", "jpg", "smart"]


class BetonWriter:
    """Writes a `.beton` sample by sample; a context manager, and only a clean exit leaves a file behind.

    It is written under a temporary name in the same folder, synced, then renamed.

    Args:
        path: the file to make or to replace.
        count_hint: N if known; a larger N than hinted costs one pass of copying at the end.
        mode: "raw" stores pixels, "jpg" JPEG bytes, "smart" JPEG for images of more than `smart_bytes` raw.
        max_side: longest side in pixels; larger images are shrunk, antialiased. None keeps all.
        channels: C of every image; FFCV's RGB field for 3 (with uint8), else an array field.
        dtype: "uint8" or "uint16" of every image.
        quality: of JPEGs encoded here, 1..100. JPEG bytes that need no change are stored as they are.
        smart_bytes: the threshold of mode "smart", in bytes of raw pixels.
        page_bytes: size of a page, a power of two from 2 MiB; it doubles by itself for a larger image.
    """

    def __init__(
        self,
        path: Path,
        *,
        count_hint: int | None = None,
        mode: Mode = "raw",
        max_side: int | None = None,
        channels: int = 3,
        dtype: str = "uint8",
        quality: int = 90,
        smart_bytes: int = 1 << 16,
        page_bytes: int = 1 << 21,
    ) -> None:
        assert page_bytes >= 1 << 21, page_bytes
        assert page_bytes & (page_bytes - 1) == 0, page_bytes
        self.path, self.mode, self.max_side, self.quality = Path(path), mode, max_side, quality
        self.channels, self.dtype, self.smart_bytes = channels, np.dtype(dtype), smart_bytes
        self._stored = self.dtype.newbyteorder("<")
        self.count, self._page_bytes = 0, page_bytes
        self._shape: tuple[int, ...] | None = None
        self._is_rgb = channels == 3 and self.dtype == np.uint8
        if not self._is_rgb and mode != "raw":
            raise UserError(
                f"{self.path}: {channels} channels of {dtype} cannot be stored as JPEG.",
                "Set the mode to raw.",
            )
        self._record = record_type([RGB if self._is_rgb else NDARRAY, INT])
        self._records_at = HEADER.itemsize + 2 * FIELD.itemsize
        self._start = self._end = _align(self._records_at + (count_hint or 1) * self._record.itemsize, page_bytes)
        self._temporary = temporary_name(self.path, "tmp")
        with writing(self.path):
            self._file: IO[bytes] = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115
            self._file.seek(self._start)
            self._records: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self._table: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115

    def add(self, image: np.ndarray | bytes, label: int = -1) -> None:
        """Append one sample: pixels (H, W, C) of the writer's dtype, or the bytes of a JPEG file."""
        self.extend((image,), (label,))

    def extend(self, images: Sequence[np.ndarray | bytes], labels: Sequence[int]) -> None:
        """Append samples, each as `add` takes it: many in one call cost far less than one by one."""
        assert len(images) == len(labels), (len(images), len(labels))
        encoded = [self._encode(image, index) for index, image in enumerate(images, self.count)]
        records, table = np.zeros(len(images), self._record), np.zeros(len(images), TABLE)
        with writing(self.path):  # moving to the next page writes out what is buffered of this one
            table["offset"] = [self._put(data, length) for *_, length, data in encoded]
            table["length"] = [length for *_, length, _ in encoded]
            table["sample"] = np.arange(self.count, self.count + len(images))
            records["f1"] = labels
            if self._is_rgb:
                image = records["f0"]
                image["offset"] = table["offset"]
                for column, name in enumerate(("mode", "height", "width")):
                    image[name] = [sample[column] for sample in encoded]
            else:
                records["f0"] = table["offset"]
            self._records.write(records.tobytes())
            self._table.write(table.tobytes())
        self.count += len(images)

    def _encode(self, image: np.ndarray | bytes, index: int) -> tuple[int, int, int, int, bytes | memoryview]:
        """(mode, height, width, bytes, data) of one sample as it will be stored."""
        if isinstance(image, bytes):
            height, width, _ = jpeg.header(image)
            fits = self.max_side is None or max(height, width) <= self.max_side
            if fits and self._wants_jpeg(height * width * 3) and jpeg.is_plain(image):
                return JPG, height, width, len(image), image
            image = decode_image(image, key=f"sample {index}", channels=self.channels)
        if image.ndim != 3 or image.shape[2] != self.channels or image.dtype != self.dtype:
            raise UserError(
                f"{self.path}: sample {index} is {image.dtype} of shape {image.shape}, "
                f"not {self.dtype} of (height, width, {self.channels}).",
                "Convert every image to one number of channels and one sample type.",
            )
        if self.max_side is not None:
            image = shrink(image, self.max_side)
        if image.shape != self._shape:
            self._check_shape(image.shape, index)
        height, width, _ = image.shape
        if self._wants_jpeg(image.nbytes):
            data = jpeg.encode(image, quality=self.quality)
            return JPG, height, width, len(data), data
        return RAW, height, width, image.nbytes, np.ascontiguousarray(image, self._stored).data

    def _wants_jpeg(self, raw_bytes: int) -> bool:
        return self.mode == "jpg" or (self.mode == "smart" and raw_bytes > self.smart_bytes)

    def _check_shape(self, shape_HWC: tuple[int, ...], index: int) -> None:
        if max(shape_HWC) > MAX_SIDE_PX or min(shape_HWC) < 1:
            raise UserError(f"{self.path}: sample {index} has shape {shape_HWC}.", "Set a maximum side.")
        if self._shape is None:
            self._shape = shape_HWC
        if not self._is_rgb and shape_HWC != self._shape:
            raise UserError(
                f"{self.path}: sample {index} is {shape_HWC}, the first is {self._shape}; "
                "only 8-bit RGB images may differ in size.",
                "Set side_px so that all images get one size.",
            )

    def _put(self, data: bytes | memoryview, length: int) -> int:
        """Write the `length` bytes of one sample so that they straddle no page; returns their offset in the file."""
        while length > self._page_bytes:
            # earlier samples stay within the doubled pages, because pages are aligned to their size
            self._page_bytes *= 2
        if self._page_bytes > MAX_PAGE:
            raise UserError(f"{self.path}: one image takes {length} bytes.", "Set a maximum side or mode jpg.")
        if self._end // self._page_bytes != (self._end + length - 1) // self._page_bytes:
            self._end = _align(self._end, self._page_bytes)
            self._file.seek(self._end)
        self._file.write(data)
        self._end += length
        return self._end - length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self.count == 0:
                    raise UserError(f"{self.path}: there is no image to write.", "Choose a source with images.")
                with writing(self.path):
                    self._finish()
        finally:
            for file in (self._file, self._records, self._table):
                with suppress(OSError):  # a full disk refuses the last flush too; its first refusal is on its way
                    file.close()
            remove(self._temporary)

    def _finish(self) -> None:
        self._file.flush()
        shift = self._make_room()
        self._file.seek(self._end + shift)
        _copy(self._table, self._file, TABLE, "offset", shift)
        self._file.seek(self._records_at)
        _copy(self._records, self._file, self._record, ("f0", "offset") if self._is_rgb else ("f0",), shift)
        self._file.seek(0)
        self._file.write(self._head(self._end + shift))
        self._file.flush()
        put_in_place(self._temporary, self.path)

    def _make_room(self) -> int:
        """Move the data up by whole pages when more samples came than were hinted; returns the bytes moved."""
        needed = _align(self._records_at + self.count * self._record.itemsize, self._page_bytes)
        if needed <= self._start:
            return 0
        shift = _align(needed - self._start, self._page_bytes)
        with open(self._temporary, "r+b") as file:
            for start in reversed(range(self._start, self._end, 1 << 24)):
                file.seek(start)
                block = file.read(min(1 << 24, self._end - start))
                file.seek(start + shift)
                file.write(block)
        return shift

    def _head(self, table_at: int) -> bytes:
        header = np.array((VERSION, 2, self._page_bytes, self.count, table_at), HEADER)
        fields = np.zeros(2, FIELD)
        fields["type"] = (RGB if self._is_rgb else NDARRAY), INT
        fields["name"] = b"image", b"label"
        if not self._is_rgb:
            assert self._shape is not None
            fields[0]["arguments"] = np.void(pack_ndarray(self.dtype, self._shape))
        return header.tobytes() + fields.tobytes()


def _align(position: int, page_bytes: int) -> int:
    return -(-position // page_bytes) * page_bytes


def _copy(source: IO[bytes], target: IO[bytes], dtype: np.dtype, path: str | tuple[str, ...], shift: int) -> None:
    """Append all records of `source` to `target`, the offset at `path` moved up by `shift` bytes."""
    source.seek(0)
    while block := source.read(dtype.itemsize << 16):
        records = np.frombuffer(bytearray(block), dtype)
        field = records
        for name in (path,) if isinstance(path, str) else path:
            field = field[name]
        field += np.uint64(shift)
        target.write(records.tobytes())
