"""Conversion compared with peers, each measurement in its own process: python bench/convert.py [--quick]

CIFAR: 50,000 JPEGs of 32 px out of a .tar.xz, and out of a folder, to raw pixels. FFCV's own writer cannot read an
archive; it has two rows, and NOTES say what each holds. Photographs: JPEGs of 340x256 px out of a folder, kept as
JPEG, to FFCV's format and to shards. Memory is that of the calling process, FFCV's workers not counted; processor
time is that of all. A run of all jobs writes bench/results/convert.json.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"
PHOTOGRAPHS = CIFAR.parent / "photographs"


def ours(source: Path, out: Path, workers: int, **options: Any) -> int:
    from fastssl.data.convert.convert import convert

    return int(convert(source, out, workers=workers, **options)["count"])


class Files:
    """Encoded images in memory, decoded by Pillow when asked for: an ImageFolder without the disk."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB"), index % 10


def ffcv_writer(files: list[bytes], out: Path, workers: int, mode: str) -> int:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    DatasetWriter(str(out), fields, num_workers=workers).from_indexed_dataset(Files(files), chunksize=100)
    return len(files)


def unpack_and_write(out: Path, workers: int) -> int:
    """From the archive to a .beton with tar, torchvision and FFCV."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    folder = out.with_name("unpacked")
    folder.mkdir()
    subprocess.run(["tar", "-xf", str(CIFAR), "-C", str(folder), "train"], check=True)
    images = ImageFolder(folder / "train")
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(out), fields, num_workers=workers).from_indexed_dataset(images, chunksize=100)
    return len(images)


def webdataset_writer(folder: Path, out: Path) -> int:
    import webdataset

    out.mkdir()
    paths = sorted(folder.rglob("*.jpg"))
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxsize=256e6, verbose=0) as writer:
        for index, path in enumerate(paths):
            writer.write({"__key__": f"{index:09d}", "jpg": path.read_bytes(), "cls": str(index % 10).encode()})
    return len(paths)


def read_files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


def make_photographs(folder: Path, count: int) -> None:
    """Crops of the two photographs that scikit-learn ships, recolored, as JPEG of quality 90."""
    originals = sample_photographs()
    rng = np.random.default_rng(0)
    for index in range(count):
        original = originals[index % 2]
        top, left = (rng.integers(0, limit) for limit in (original.shape[0] - 256, original.shape[1] - 340))
        crop = original[top : top + 256, left : left + 340] * rng.uniform(0.6, 1.2, 3)
        path = folder / f"class{index % 10}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def sample_photographs() -> list[np.ndarray]:
    """scikit-learn's; or their copies next to the images, where tools/pack_gpu_suite.py put them."""
    files = [PHOTOGRAPHS / name for name in ("china.jpg", "flower.jpg")]
    if all(file.exists() for file in files):
        return [np.asarray(Image.open(file)) for file in files]
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def unpack_train(folder: Path, count: int) -> None:
    """The first `count` training JPEGs of the archive as files."""
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("train/"):
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                extracted = archive.extractfile(member)
                assert extracted is not None
                path.write_bytes(extracted.read())
                count -= 1
                if not count:
                    return


JOBS: dict[str, tuple[str, str]] = {  # name -> (what is converted, implementation)
    "cifar-archive": ("cifar", "fastssl"),
    "cifar-folder": ("cifar", "fastssl, from a folder"),
    "cifar-archive-ffcv": ("cifar", "ffcv, from the archive"),
    "cifar-ffcv": ("cifar", "ffcv"),
    "photo-jpg": ("photographs", "fastssl"),
    "photo-jpg-ffcv": ("photographs", "ffcv"),
    "photo-shards": ("photographs to shards", "fastssl"),
    "photo-shards-peer": ("photographs to shards", "webdataset"),
}

NOTES = {
    "cifar-archive": "From the archive to the .beton in one call.",
    "cifar-archive-ffcv": "From the archive too: tar unpacks its train folder to disk, torchvision's ImageFolder lists "
    "and opens it by Pillow, FFCV's writer stores it; the time is the sum.",
    "cifar-ffcv": "FFCV's writer alone: the files are in memory, unpacked beforehand and untimed; Pillow decodes them.",
}


def job(name: str, data: Path, target: Path, workers: int) -> Callable[[], int]:
    """The measured call, with all that does not belong to it already done."""
    if name == "cifar-archive":
        return lambda: ours(CIFAR, target, workers)
    if name == "cifar-folder":
        return lambda: ours(data / "cifar", target, workers)
    if name == "cifar-archive-ffcv":
        return lambda: unpack_and_write(target, workers)
    if name == "cifar-ffcv":
        files = read_files(data / "cifar")
        return lambda: ffcv_writer(files, target, workers, "raw")
    if name == "photo-jpg":
        return lambda: ours(data / "photographs", target, workers, mode="jpg")
    if name == "photo-jpg-ffcv":
        files = read_files(data / "photographs")
        return lambda: ffcv_writer(files, target, workers, "jpg")
    if name == "photo-shards":
        return lambda: ours(data / "photographs", target, workers, format="webdataset")
    return lambda: webdataset_writer(data / "photographs", target)


def measure_here(name: str, data: Path, workers: int) -> dict[str, float]:
    """Seconds, images and peak memory of one job, after an untimed conversion that loads and compiles everything."""
    with tempfile.TemporaryDirectory(dir=data) as folder:
        if not name.endswith(("ffcv", "peer")):
            ours(Path("shapes"), Path(folder) / "warm-up.beton", workers, count=512)
        call = job(name, data, Path(folder) / "out", workers)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        count = call()
        seconds, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu_start
    # not ru_maxrss, which a child inherits from whoever started it
    status = Path("/proc/self/status").read_text()
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"images_per_s": count / seconds, "cpu_us_per_image": 1e6 * cpu_s / count, "peak_mb": peak_kb / 1024}


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def measure(name: str, data: Path, workers: int) -> dict[str, float]:
    """`measure_here` in a fresh process."""
    command = [sys.executable, __file__, "--one", name, "--data", str(data), "--workers", str(workers)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cifar", type=int, default=50_000, help="files unpacked for the jobs that need files")
    parser.add_argument("--photographs", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="one repeat, few files, nothing written")
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_here(arguments.one, arguments.data, arguments.workers)))
        return
    from fastssl.bench.record import row, write

    repeats = 1 if arguments.quick else arguments.repeats
    photographs, cifar = (200, 1000) if arguments.quick else (arguments.photographs, arguments.cifar)
    names = [name for name in arguments.only if CIFAR.exists() or not name.startswith("cifar")]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        if {"cifar-folder", "cifar-ffcv"} & set(names):
            unpack_train(data / "cifar", cifar)
        if any(name.startswith("photo") for name in names):
            make_photographs(data / "photographs", photographs)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(repeats):  # in turn, so that a slow spell of the machine touches all alike
            for name in names:
                results[name].append(measure(name, data, arguments.workers))
                print(name, results[name][-1], file=sys.stderr)
    rows = []
    for name, found in results.items():
        what, implementation = JOBS[name]
        work = {"images": what, "workers": arguments.workers}
        metrics = ("images_per_s", "cpu_us_per_image", "peak_mb")
        note = {"note": NOTES[name]} if name in NOTES else {}
        rows += [row(implementation, work, metric, [one[metric] for one in found], **note) for metric in metrics]
    print(json.dumps(rows, indent=1))
    if not arguments.quick and names == list(JOBS):
        write(ROOT / "bench" / "results" / "convert.json", "convert", rows)


if __name__ == "__main__":
    main()
