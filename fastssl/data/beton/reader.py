"""Reads FFCV's `.beton` file in numpy alone; `BetonWriter` writes it.

Nothing that a file states is believed before it has been held against the file's length: a foreign, truncated or
mutated file is a UserError, never a crash or an allocation larger than the file.

N samples, H W height and width in pixels, C channels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from fastssl.data.beton.format import (
    FIELD,
    HEADER,
    INT,
    JPG,
    NDARRAY,
    RAW,
    RECORDS,
    RGB,
    TABLE,
    TENSOR,
    VERSION,
    parse_ndarray,
    record_type,
)
from fastssl.data.beton.writer import BetonWriter, Mode
from fastssl.data.formats import jpeg
from fastssl.errors import UserError

__all__ = ["Beton", "BetonWriter", "Mode"]


class Beton:
    """A `.beton` opened for reading: memory-mapped, and checked as a whole before anything is returned.

    Args:
        path: the file. UserError when it is missing, foreign, truncated or contradicts itself.

    Attributes:
        integers: int64 (N,) of each integer field, by name.
        labels: int64 (N,), -1 throughout when the file has no integer field.
        sizes: int64 (N, 2) height and width in pixels.
        channels, dtype: of every image.
        fields: name -> FFCV's type number, in the file's order.
        image_field: name of the field that holds the images.
        is_rgb: that field is FFCV's RGB image, else its array.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._bytes = self._map()
        self._read_head()
        self._read_records()

    def _map(self) -> np.ndarray:
        try:
            return np.memmap(self.path, np.uint8, mode="r")
        except FileNotFoundError as error:
            raise UserError(f"{self.path} does not exist.", "Make it with: fastssl convert SOURCE OUT.") from error
        except (OSError, ValueError) as error:  # numpy's word for an empty file is ValueError
            raise UserError(f"{self.path} cannot be read: {error}.", "Give a .beton file.") from error

    def _fail(self, what: str) -> UserError:
        return UserError(f"{self.path} is not a sound .beton file: {what}.", "Convert the data again.")

    def _view(self, start: int, count: int, dtype: np.dtype, what: str) -> np.ndarray:
        """`count` records of dtype from byte `start`, or UserError when the file ends before."""
        stop = start + count * dtype.itemsize
        if stop > self._bytes.size:
            raise self._fail(f"{what} would end at byte {stop}, the file has {self._bytes.size}")
        return np.frombuffer(self._bytes[start:stop], dtype)

    def _read_head(self) -> None:
        header = self._view(0, 1, HEADER, "the header")[0]
        if header["version"] != VERSION:
            raise self._fail(f"its version is {header['version']}, this reads {VERSION}")
        self._count, self._table_at = int(header["samples"]), int(header["table"])
        if header["fields"] == 0:
            raise self._fail("it has no fields")
        self._fields = self._view(HEADER.itemsize, int(header["fields"]), FIELD, "the list of fields")
        unknown = sorted({int(kind) for kind in self._fields["type"]} - set(RECORDS))
        if unknown:
            raise self._fail(f"it has fields of unknown type {unknown}")
        if self._count == 0:
            raise self._fail("it has no samples")
        names = [bytes(name).decode("ascii", "replace") for name in self._fields["name"]]
        self.fields = dict(zip(names, (int(kind) for kind in self._fields["type"]), strict=True))

    def _read_records(self) -> None:
        kinds = [int(kind) for kind in self._fields["type"]]
        start = HEADER.itemsize + self._fields.nbytes
        record = record_type(kinds)
        records = self._view(start, self._count, record, f"the records of {self._count} samples")
        self._data_at = start + records.nbytes
        names = list(self.fields) if len(self.fields) == len(kinds) else [""] * len(kinds)
        integers = [(name, f"f{i}") for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == INT]
        self.integers = {name: records[key].astype(np.int64) for name, key in integers}
        labels = _choose(kinds, names, (INT,), "label")
        self.labels = np.full(self._count, -1, np.int64) if labels is None else records[f"f{labels}"].astype(np.int64)
        image = _choose(kinds, names, (RGB,), "image")
        self.is_rgb = image is not None
        if image is None:
            image = _choose(kinds, names, (NDARRAY, TENSOR), "image")
        if image is None:
            raise self._fail("it has no image field")
        self.image_field = names[image]
        if self.is_rgb:
            self._read_rgb(records[f"f{image}"])
        else:
            self._read_arrays(records[f"f{image}"], bytes(self._fields[image]["arguments"]))

    def _read_rgb(self, records: np.ndarray) -> None:
        self.channels, self.dtype = 3, np.dtype(np.uint8)
        self._modes = records["mode"].copy()
        if self._modes.max() > RAW:
            raise self._fail(f"sample {int(self._modes.argmax())} has storage mode {self._modes.max()}")
        self.sizes = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
        if self.sizes.min() < 1:
            raise self._fail("an image has no height or no width")
        self._offsets = records["offset"].copy()
        self._lengths = self.sizes.prod(axis=1).astype(np.uint64) * np.uint64(3)
        is_jpg = self._modes == JPG
        if is_jpg.any():
            self._lengths[is_jpg] = self._table_lengths(self._offsets[is_jpg])
        self._check_extents()

    def _read_arrays(self, offsets: np.ndarray, arguments: bytes) -> None:
        parsed = parse_ndarray(arguments)
        if parsed is None:
            raise self._fail("its array field is no (height, width, channels) of uint8 or uint16")
        self.dtype, (height, width, self.channels) = parsed
        length = height * width * self.channels * self.dtype.itemsize
        if length > self._bytes.size:
            raise self._fail(f"each image would take {length} bytes, the file has {self._bytes.size}")
        self._modes = np.full(self._count, RAW, np.uint8)
        self.sizes = np.broadcast_to(np.array([height, width], np.int64), (self._count, 2))
        self._offsets, self._lengths = offsets.copy(), np.full(self._count, length, np.uint64)
        self._check_extents()

    def _table_lengths(self, offsets: np.ndarray) -> np.ndarray:
        """Length in bytes of each JPEG, which only the table at the file's end knows."""
        count = max(0, self._bytes.size - self._table_at) // TABLE.itemsize
        table = self._view(self._table_at, count, TABLE, "the table of lengths")
        order = np.argsort(table["offset"], kind="stable")
        positions = np.searchsorted(table["offset"], offsets, sorter=order)
        if count == 0 or positions.max() >= count or (table["offset"][order[positions]] != offsets).any():
            raise self._fail("the table of lengths misses a JPEG")
        return table["length"][order[positions]]  # type: ignore[no-any-return]

    def _check_extents(self) -> None:
        size = np.uint64(self._bytes.size)
        # offsets first: only then is their sum with a length below 2^64
        inside = (self._offsets >= self._data_at) & (self._offsets <= size) & (self._lengths > 0)
        inside &= self._lengths <= size
        inside &= self._offsets + self._lengths <= size
        if not inside.all():
            raise self._fail(f"sample {int(inside.argmin())} lies outside the file")
        if float(self._lengths.sum(dtype=np.float64)) > float(size):
            raise self._fail("its samples overlap")

    def __len__(self) -> int:
        return self._count

    @property
    def extents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Storage mode (0 JPEG, 1 raw; uint8), first byte and length in the file (uint64) of each sample: (N,)."""
        return self._modes, self._offsets, self._lengths

    @property
    def is_uniform(self) -> bool:
        """All images of one height and width."""
        return bool((self.sizes == self.sizes[0]).all())

    @property
    def is_raw(self) -> bool:
        """No image is stored as JPEG."""
        return bool((self._modes == RAW).all())

    def encoded(self, i: int) -> tuple[Literal["raw", "jpg"], memoryview]:
        """Storage mode and stored bytes of sample i, not copied."""
        start = int(self._offsets[i])
        view = self._bytes[start : start + int(self._lengths[i])]
        return ("raw" if self._modes[i] == RAW else "jpg"), view.data

    def image(self, i: int) -> np.ndarray:
        """Pixels (H, W, C) of sample i, equal to FFCV's bit for bit; a view of the file when stored raw.

        UserError when its JPEG is broken or of another size than the file's records say.
        """
        mode, data = self.encoded(i)
        shape = (int(self.sizes[i, 0]), int(self.sizes[i, 1]), self.channels)
        if mode == "raw":
            return np.frombuffer(data, self.dtype).reshape(shape)
        try:
            height, width, _ = jpeg.header(data)
            if (height, width) != shape[:2]:
                raise ValueError(f"it is {height}x{width}, its record says {shape[0]}x{shape[1]}")
            return jpeg.decode_rgb(data, fast_dct=True)
        except ValueError as error:
            raise self._fail(f"the JPEG of sample {i} cannot be decoded: {error}") from error

    def raw_images(self) -> np.ndarray:
        """All images (N, H, W, C): a view of the file where they lie evenly in it, else gathered into memory.

        Only for files where `is_raw` and `is_uniform`.
        """
        assert self.is_raw
        assert self.is_uniform
        shape = (self._count, int(self.sizes[0, 0]), int(self.sizes[0, 1]), self.channels)
        everything = np.arange(self._count)
        runs = list(self._runs(everything))
        if len(runs) == 1:
            return np.frombuffer(self._bytes[runs[0][0] : runs[0][1]], self.dtype).reshape(shape)
        images = np.empty(shape, self.dtype)
        self.read_raw(images.reshape(-1), everything)
        return images

    def read_raw(self, target: np.ndarray, index_B: np.ndarray) -> None:
        """Copy the pixels of these samples, one after another, into `target` (total,) of the file's dtype."""
        target_bytes, position, data = target.view(np.uint8), 0, np.asarray(self._bytes)
        for first, last in self._runs(index_B):
            target_bytes[position : position + last - first] = data[first:last]
            position += last - first

    def _runs(self, index_B: np.ndarray) -> Iterator[tuple[int, int]]:
        """(first, last + 1) bytes of the longest stretches in which these samples follow each other in the file."""
        if len(index_B) == 0:
            return
        first_B = self._offsets[index_B]
        last_B = first_B + self._lengths[index_B]
        is_end_B = np.append(first_B[1:] != last_B[:-1], True)
        is_start_B = np.roll(is_end_B, 1)
        yield from zip(first_B[is_start_B].tolist(), last_B[is_end_B].tolist(), strict=True)


def _choose(kinds: list[int], names: list[str], wanted: tuple[int, ...], name: str) -> int | None:
    """Position of the field of a wanted type: the one called `name`, else the first, else None."""
    positions = [i for i, kind in enumerate(kinds) if kind in wanted]
    return next((i for i in positions if names[i] == name), positions[0] if positions else None)
