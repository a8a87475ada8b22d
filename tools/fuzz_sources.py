"""Mutates a small file of every source and every image format and reads it: only clear errors may come.

    python tools/fuzz_sources.py --seconds 240 --seed 1

Prints a line per kind: files read, refused, and what else came (raw exceptions, warnings on the screen), which is a
defect; the exit code is then 1. The same seed gives the same files.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, features

from fastssl.data.beton.writer import BetonWriter
from fastssl.data.convert.prepare import Shape, prepare
from fastssl.data.sources import Indexed, open_source
from fastssl.errors import UserError

IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), np.uint8)
LABELS_N = np.array([0, 1, 0, 1])
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
KINDS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(k for k in OPTIONAL if features.check(OPTIONAL[k]))]
SUFFIX = {"JPEG2000": "jp2"}
READING = Shape(side_px=8, channels=3)


def encoded(kind: str = "PNG", index: int = 0) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    Image.fromarray(IMAGES_NHWC[index]).save(file, kind, **options)
    return file.getvalue()


def make_csv(path: Path) -> None:
    for i in range(4):
        (path.parent / f"{i}.png").write_bytes(encoded(index=i))
    path.write_text("path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4)))


def make_tar(path: Path, *, samples: bool = False) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for i in range(4):
            files = (
                {f"{i}.png": encoded(index=i), f"{i}.cls": b"1"} if samples else {f"{'ab'[i % 2]}/{i}.png": encoded()}
            )
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", encoded(index=i))


def make_beton(path: Path) -> None:
    with BetonWriter(path, count_hint=4, mode="jpg") as writer:
        writer.extend(list(IMAGES_NHWC), LABELS_N.tolist())


def make_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": encoded(index=i), "path": f"{i}.png"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": LABELS_N}), path)


def make_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"image": [encoded(index=i) for i in range(4)], "label": LABELS_N})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))


# name of the file that is mutated -> how to make it; what is opened is the file, or its folder (FOLDERS)
MAKERS: dict[str, Callable[[Path], None]] = {
    "x.csv": make_csv,
    "x.tar": make_tar,
    "x.tar.gz": make_tar,
    "samples.tar": lambda path: make_tar(path, samples=True),
    "x.zip": make_zip,
    "x.beton": make_beton,
    "x.npy": lambda path: np.save(path, IMAGES_NHWC),
    "x.npz": lambda path: np.savez_compressed(path, images=IMAGES_NHWC, labels=LABELS_N),
    "x.parquet": make_parquet,
    "data.arrow": make_arrow,
    "state.json": lambda path: make_arrow(path.with_name("data.arrow")),
}
MAKERS |= {
    f"image.{SUFFIX.get(kind, kind.lower())}": lambda path, kind=kind: path.write_bytes(encoded(kind)) and None
    for kind in KINDS
}
FOLDERS = ("data.arrow", "state.json", "image.")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut off, doubled, exchanged or inserted."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(changed) or 1), rng.choice((1, 2, 4, 32))
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at:at] = rng.randbytes(length)
            case 5 if rng.random() < 0.1:
                del changed[at:]
    return bytes(changed)


def read(path: Path) -> str:
    """read | refused | raw: ..., after reading and decoding everything."""
    with warnings.catch_warnings(record=True) as bare:
        warnings.simplefilter("always")
        try:
            source = open_source(path)
            items = (source.read(i) for i in range(len(source))) if isinstance(source, Indexed) else source.items()
            refused = 0
            run = prepare(iter(items), READING)
            while run.rest is not None:
                refused += len(run.refused)
                run = prepare(run.rest, READING)
            outcome = "refused" if refused + len(run.refused) else "read"
        except UserError as error:
            outcome = "refused" if len(str(error).splitlines()) == 2 else f"raw: an error of several lines: {error}"
        except Exception as error:
            outcome = f"raw: {type(error).__name__}: {error}"
    return f"raw: warning {bare[0].message}" if bare else outcome


def fuzz(folder: Path, rng: random.Random, *, rounds: int, deadline: float = float("inf")) -> dict[str, Counter[str]]:
    """Outcomes of every kind of file, each mutated `rounds` times or until the deadline (time.monotonic)."""
    outcomes: dict[str, Counter[str]] = {}
    sound: dict[Path, bytes] = {}
    for name, make in MAKERS.items():
        path = folder / name.replace(".", "_") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError):  # pyarrow is an extra
            make(path)
            sound[path] = path.read_bytes()
            outcomes[name] = Counter()
    for _ in range(rounds):
        for path, data in sound.items():
            if time.monotonic() > deadline:
                return outcomes
            path.write_bytes(mutated(data, rng))
            opened = path.parent if path.name.startswith(FOLDERS) else path
            outcomes[path.name][read(opened)] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + given.seconds
        outcomes = fuzz(Path(folder), random.Random(given.seed), rounds=10**9, deadline=deadline)
    for name, counts in outcomes.items():
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.most_common())}")
    return int(any(what.startswith("raw") for counts in outcomes.values() for what in counts))


if __name__ == "__main__":
    sys.exit(main())
