"""Throw mutated `.beton` files at the reader: python tools/fuzz_beton.py --count 1000000 --seed 0.

Every file must be read rightly or be refused with a UserError. Anything else ends the run and leaves the file behind.
tests/data/test_beton.py runs the first mutations of each release.
"""

import argparse
import io
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from fastssl.data.beton.format import FIELD, HEADER, TABLE
from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.errors import UserError

EXTREMES = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def seeds(folder: Path) -> list[bytes]:
    """Small sound files of every kind: raw, JPEG, mixed, one size and several, and an array field."""
    made = []
    for mode, channels, dtype in (
        ("raw", 3, "uint8"),
        ("jpg", 3, "uint8"),
        ("smart", 3, "uint8"),
        ("raw", 2, "uint16"),
    ):
        path = folder / "seed.beton"
        with BetonWriter(path, mode=mode, channels=channels, dtype=dtype, smart_bytes=200) as writer:
            for i in range(4):
                size = (8, 8) if channels == 2 or mode == "raw" else (6 + i, 9)
                writer.add(np.full((*size, channels), 20 * i, dtype), i)
        made.append(compact(path.read_bytes()))
    return made


def compact(data: bytes) -> bytes:
    """The same file without the empty space before its data: mutations then hit something that matters."""
    header = np.frombuffer(data, HEADER, 1)[0]
    fields_end = HEADER.itemsize + int(header["fields"]) * FIELD.itemsize
    table = np.frombuffer(data, TABLE, offset=int(header["table"])).copy()
    start = int(table["offset"].min())
    is_array = data[HEADER.itemsize] == 4
    record_bytes = 16 if is_array else 24
    records_end = fields_end + int(header["samples"]) * record_bytes
    head, shift = bytearray(data[:records_end]), start - records_end
    for i in range(int(header["samples"])):
        at = fields_end + i * record_bytes + (0 if is_array else 5)
        struct.pack_into("<Q", head, at, struct.unpack_from("<Q", head, at)[0] - shift)
    struct.pack_into("<Q", head, 16, int(header["table"]) - shift)
    table["offset"] -= np.uint64(shift)
    return bytes(head) + data[start : int(header["table"])] + table.tobytes()


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: a bit, an extreme number anywhere, a cut, a repeat, a stretch of one byte."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        kind, at = int(rng.integers(6)), place(changed, rng)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind in (1, 2):
            width = int(rng.choice([1, 2, 4, 8]))
            value = EXTREMES[int(rng.integers(len(EXTREMES)))] % 256**width
            changed[at : at + width] = value.to_bytes(width, "little")
        elif kind == 3 and rng.random() < 0.3:
            del changed[at:]
        elif kind == 4:
            changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
        else:
            changed[at : at + 16] = bytes([int(rng.integers(256))]) * 16
        if not changed:
            break
    return bytes(changed)


def place(data: bytearray, rng: np.random.Generator) -> int:
    """A position: half the time in the header, the fields' first bytes, the records or the table."""
    size = len(data)
    records = HEADER.itemsize + 2 * FIELD.itemsize
    spots = ((0, 24), (24, 42), (1065, 1083), (records, records + 96), (size - 96, size), (42, 350))
    low, high = spots[int(rng.integers(len(spots)))] if rng.random() < 0.7 else (0, size)
    return int(np.clip(rng.integers(low, high) if high > low else 0, 0, size - 1))


def read_all(path: Path) -> str:
    """What came of the file: "read" or "refused". Every other outcome is an exception or an AssertionError."""
    try:
        beton = Beton(path)
        for i in range(len(beton)):
            image = beton.image(i)
            assert image.shape == (*beton.sizes[i], beton.channels), image.shape
            assert image.dtype == beton.dtype, image.dtype
            assert -(2**63) <= int(beton.labels[i]) < 2**63
        if beton.is_raw and beton.is_uniform:
            assert beton.raw_images().shape == (len(beton), *beton.image(0).shape)
    except UserError:
        return "refused"
    return "read"


def fuzz(count: int, seed: int, folder: Path, *, progress: io.TextIOBase | None = None) -> Counter[str]:
    """Read `count` mutated files; returns how many were read and how many refused."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    sound, path = seeds(folder), folder / "mutated.beton"
    for data in sound:
        path.write_bytes(data)
        assert read_all(path) == "read", "a sound file was refused"
    for i in range(count):
        path.write_bytes(mutate(sound[i % len(sound)], rng))
        found[read_all(path)] += 1
        if progress is not None and i % 10_000 == 9_999:
            print(f"{i + 1} files: {dict(found)}", file=progress, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    memory = Path("/dev/shm")  # rewriting a file on a disk costs milliseconds
    folder = Path(tempfile.mkdtemp(prefix="fuzz-beton-", dir=memory if memory.is_dir() else None))
    print(f"the last file is kept in {folder}")
    fuzz(arguments.count, arguments.seed, folder, progress=sys.stdout)


if __name__ == "__main__":
    main()
