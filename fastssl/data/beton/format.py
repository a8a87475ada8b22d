"""The bytes of FFCV's `.beton` file, version 2, as FFCV 1.0.2 writes and reads them.

Little-endian: header (24 bytes), one descriptor (1041 bytes) per field, one metadata record per sample, then the
data in pages that no sample straddles, last a table of (sample, offset, length). The image is FFCV's
RGBImageField for uint8 (H, W, 3) and its NDArrayField for uint16 or other channel counts, where all samples have
one shape; the label is its IntField.
"""

import json
import struct

import numpy as np

from fastssl.data.limits import MAX_SIDE_PX

VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
TABLE = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("length", "<u8")])
BLOB = np.dtype([("offset", "<u8"), ("length", "<u8")])
FLOAT, INT, RGB, BYTES, NDARRAY, JSON, TENSOR = range(7)
RECORDS: dict[int, np.dtype] = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    RGB: IMAGE,
    BYTES: BLOB,
    NDARRAY: np.dtype("<u8"),
    JSON: BLOB,
    TENSOR: np.dtype("<u8"),
}
JPG, RAW = 0, 1
MAX_PAGE = 1 << 31  # a page's size is stored in 32 bits and is a power of two
NDARRAY_SHAPE_BYTES = 32 * 8  # NDArrayField's arguments: 32 dimensions, a length, then that much JSON
SAMPLE_TYPES: dict[str, np.dtype] = {"|u1": np.dtype("u1"), "<u2": np.dtype("<u2")}


def record_type(kinds: list[int]) -> np.dtype:
    """One sample's metadata record for fields of these FFCV types, padded as a C compiler would."""
    return np.dtype([(f"f{i}", RECORDS[kind]) for i, kind in enumerate(kinds)], align=True)


def pack_ndarray(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """NDArrayField's 1024 argument bytes."""
    text = json.dumps(dtype.newbyteorder("<").descr).encode("ascii")
    dimensions = struct.pack("<32Q", *shape, *[0] * (32 - len(shape)))
    return (dimensions + struct.pack("<Q", len(text)) + text).ljust(1024, b"\0")


def parse_ndarray(arguments: bytes) -> tuple[np.dtype, tuple[int, int, int]] | None:
    """Type and (H, W, C) of an array field, None when it holds anything but such images."""
    arguments = arguments.ljust(1024, b"\0")
    dimensions = struct.unpack("<32Q", arguments[:NDARRAY_SHAPE_BYTES])
    (length,) = struct.unpack_from("<Q", arguments, NDARRAY_SHAPE_BYTES)
    try:
        ((_, type_name),) = json.loads(arguments[NDARRAY_SHAPE_BYTES + 8 :][:length])
        dtype = SAMPLE_TYPES[type_name]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    height, width, channels = dimensions[:3]
    if any(dimensions[3:]) or not all(1 <= d <= MAX_SIDE_PX for d in dimensions[:3]):
        return None
    return dtype, (int(height), int(width), int(channels))
