"""Loaders compared with peers, each measurement in its own process: python bench/loaders.py [--quick]

No views: decoded uint8 batches in shuffled order. Views: V crops with flips of each image, "random_resized" or "pad"
(shifted by up to 4 px, black outside, never scaled). Ours are float32 and normalized; the peers' stay uint8, save those
of ffcv-normalized. FFCV needs one pipeline per view. CIFAR: 50,000 images of 32 px; photographs: JPEGs of 340x256 px,
views of 224 px. All files lie in the page cache. Writes bench/results/loaders.json.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from convert import CIFAR, make_photographs, unpack_train  # noqa: E402

from fastssl.bench.record import row, write  # noqa: E402

Epoch = Callable[[int], Iterator[int]]  # epoch -> how many images each step delivered
BATCH = {"cifar": 512, "photographs": 64}
SIDE_PX = {"cifar": 32, "photographs": 224}
PAD_PX = 4


def ours(kind: str, data: Path, images: str, views: int, crop: str, workers: int) -> Epoch:
    """One of our loaders, as training on the CPU runs it; with views > 0 the fused backend cuts them."""
    from fastssl.augment.draws import permutation
    from fastssl.data.beton.reader import Beton
    from fastssl.training.guards import keep_freed_memory

    keep_freed_memory()

    path = data / f"{images}.beton"
    options: dict[str, Any] = {"threads": workers, "device": "cpu", "batch_size": BATCH[images]}
    options["order"] = partial(permutation, 0, count=len(Beton(path)))
    if kind in ("resident", "mmap"):
        options |= {"memory": "mmap" if kind == "mmap" else "device", "in_place": views > 0}
    module = importlib.import_module("fastssl.data.loaders." + (kind if kind in ("ffcv", "dali") else "resident"))
    loader = module.open_loader(path, **options)
    augment = cutter(SIDE_PX[images], views, crop) if views else None

    def epoch(number: int) -> Iterator[int]:
        for batch in loader.epoch(number):
            if augment is not None:
                augment(batch, number)
            yield len(batch)

    return epoch


def cutter(side_px: int, views: int, crop: str = "random_resized") -> Any:
    """Crops and flips, nothing else: what the peers do here."""
    import torch

    from fastssl.augment.augment import Augment
    from fastssl.augment.backend import backend_of
    from fastssl.augment.policy import View
    from fastssl.recipe.schema import ViewSpec

    kind: dict[str, Any] = {"pad_px": PAD_PX} if crop == "pad" else {"area_min": 0.08, "area_max": 1.0}
    spec = ViewSpec(side_px=side_px, crop=crop, hflip_p=0.5, **kind)
    rows = (View(**spec.model_dump(include=set(View.__slots__))),) * views
    return Augment(rows, (0.5,) * 3, (0.25,) * 3, 0, torch.float32, backend_of("cpu"))


def plain_ffcv(data: Path, images: str, views: int, crop: str, workers: int, *, normalizes: bool = False) -> Epoch:
    """FFCV as its documentation sets it up; several views are several pipelines from one field."""
    import numba
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, ToTensor

    pipelines: dict[str, Any] = {"image": [SimpleRGBImageDecoder(), ToTensor()]}
    for view in range(views):
        decoder, steps = RandomResizedCropRGBImageDecoder((SIDE_PX[images],) * 2), [RandomHorizontalFlip()]
        if crop == "pad":
            decoder, steps = SimpleRGBImageDecoder(), [RandomHorizontalFlip(), RandomTranslate(padding=PAD_PX)]
        if normalizes:
            steps += [NormalizeImage(np.full(3, 127.5), np.full(3, 63.75), np.float32)]
        name = "image" if view == 0 else f"view{view}"
        pipelines[name] = PipelineSpec("image", decoder=decoder, transforms=[*steps, ToTensor()])
    loader = Loader(
        str(data / f"{images}.beton"),
        batch_size=BATCH[images],
        num_workers=min(workers, numba.config.NUMBA_NUM_THREADS),
        order=OrderOption.RANDOM,
        pipelines=pipelines,
    )
    return lambda _: (len(batch[0]) for batch in loader)


def plain_dali(data: Path, images: str, views: int, crop: str, workers: int) -> Epoch:
    """DALI as its documentation sets it up: a file reader that shuffles, a decoder, its PyTorch iterator."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=BATCH[images], num_threads=workers, device_id=None)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(
            file_root=str(data / images), random_shuffle=True, initial_fill=4096, name="reader"
        )
        decoded = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
        side = SIDE_PX[images]
        cut = [
            fn.flip(fn.random_resized_crop(decoded, size=(side, side)), horizontal=fn.random.coin_flip())
            for _ in range(views)
        ]
        return (*(cut or [decoded]), labels)

    names = [f"view{view}" for view in range(max(1, views))] + ["labels"]
    iterator = DALIGenericIterator(
        [pipeline()], names, reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    return lambda _: (len(step[0]["labels"]) for step in iterator)


def torchvision_folder(data: Path, images: str, views: int, crop: str, workers: int) -> Epoch:
    """ImageFolder and DataLoader; each image is decoded once and cut `views` times."""
    import torch
    from torchvision import datasets
    from torchvision.transforms import v2

    cut = v2.Compose([v2.RandomResizedCrop(SIDE_PX[images], antialias=True), v2.RandomHorizontalFlip()])

    def transform(image: Any) -> Any:
        tensor = v2.functional.pil_to_tensor(image)
        return torch.stack([cut(tensor) for _ in range(views)]) if views else tensor

    folder = datasets.ImageFolder(str(data / images), transform)
    loader = torch.utils.data.DataLoader(
        folder, BATCH[images], shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    return lambda _: (len(batch) for batch, _ in loader)


def webdataset_shards(data: Path, images: str, views: int, crop: str, workers: int) -> Epoch:
    """The webdataset package over our shards, shuffled through a buffer."""
    import webdataset
    from torchvision.transforms import v2

    assert views == 0, views
    shards = sorted(str(path) for path in (data / f"{images}_shards").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(v2.functional.pil_to_tensor, int)
        .batched(BATCH[images], partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=min(workers, len(shards)))
    return lambda _: (len(batch) for batch, _ in loader)


IMPLS: dict[str, Callable[..., Epoch]] = {
    "fastssl-resident": partial(ours, "resident"),
    "fastssl-mmap": partial(ours, "mmap"),
    "fastssl-ffcv": partial(ours, "ffcv"),
    "fastssl-dali": partial(ours, "dali"),
    "ffcv": plain_ffcv,
    "ffcv-normalized": partial(plain_ffcv, normalizes=True),
    "dali": plain_dali,
    "torchvision": torchvision_folder,
    "webdataset": webdataset_shards,
}


Job = tuple[str, str, int, str]  # implementation, images, views, kind of crop; no views are decoded batches
CUT = {  # that make views of a kind too
    "random_resized": ("fastssl-resident", "fastssl-ffcv", "fastssl-dali", "ffcv", "dali", "torchvision"),
    "pad": ("fastssl-resident", "fastssl-ffcv", "ffcv", "ffcv-normalized"),
}


def jobs(data: Path, *, only: list[str], images: list[str], views: list[int]) -> list[Job]:
    """What is to be measured; resident photographs have been decoded before, so they are no row of it."""
    there = [kind for kind in images if (data / f"{kind}.beton").exists()]
    every: list[Job] = []
    for kind in there:
        if 0 in views:
            every += [(impl, kind, 0, "") for impl in IMPLS if impl != "ffcv-normalized"]
        for crop in CUT if kind == "cifar" else ("random_resized",):
            every += [(impl, kind, v, crop) for v in views if v for impl in CUT[crop]]
    return [job for job in every if job[0] in only and job[:2] != ("fastssl-resident", "photographs")]


def measure_here(job: Job, data: Path, workers: int, seconds: float, windows: int) -> dict[str, list[float]]:
    """Rates of so many windows after an untimed one of half their length, seconds to the first batch, peak memory."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(workers)
    impl, images, views, crop = job
    start = time.perf_counter()
    epoch = IMPLS[impl](data, images, views, crop, workers)
    steps = (step for number in count() for step in epoch(number))
    next(steps)
    first_s = time.perf_counter() - start
    rates = []
    for limit_s in (seconds / 2, *[seconds] * windows):
        start, delivered = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < limit_s:
            delivered += next(steps)
        rates.append(delivered / passed)
    found = {"images_per_s": rates[1:], "first_batch_s": [first_s], "peak_mb": [peak_mb()]}
    return {**found, "views_per_s": [rate * views for rate in rates[1:]]} if views else found


def peak_mb() -> float:
    """This process's highest resident memory, and what its workers hold for themselves; shared pages count once."""
    status = Path("/proc/self/status").read_text().splitlines()
    own_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    children = psutil.Process().children(recursive=True)
    return own_kib / 1024 + sum(child.memory_full_info().uss for child in children) / 2**20


def measure(job: Job, data: Path, *options: str) -> dict[str, list[float]] | None:
    """`measure_here` in a fresh process; None, with a word why, where a peer is missing or fails."""
    command = [sys.executable, __file__, "--one", json.dumps(job), "--data", str(data), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        print(job, "failed:", (run.stderr.strip().splitlines() or ["?"])[-1], file=sys.stderr)
        return None
    found: dict[str, list[float]] = json.loads(run.stdout.strip().splitlines()[-1])
    print(job, found, file=sys.stderr)
    return found


def prepare(data: Path, photographs: int) -> None:
    """Folders of JPEGs, and the same images as a `.beton` (raw CIFAR, JPEG photographs) and as shards."""
    from fastssl.data.convert.convert import convert

    if CIFAR.exists():
        unpack_train(data / "unpacked", 50_000)
        (data / "unpacked" / "train").rename(data / "cifar")
        convert(data / "cifar", data / "cifar.beton", mode="raw")
    if photographs:
        make_photographs(data / "photographs", photographs)
        convert(data / "photographs", data / "photographs.beton", mode="jpg")
    for images in BATCH:
        if (data / images).exists():
            convert(data / images, data / f"{images}_shards", format="webdataset", shard_mb=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5, help="processes of each measurement")
    parser.add_argument("--windows", type=int, default=1, help="timed in each process: starting costs the most")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window, after half of that unmeasured")
    parser.add_argument("--photographs", type=int, default=3000)
    parser.add_argument("--views", type=int, nargs="*", default=[0, 1, 2, 4, 8], help="0: decoded batches, no views")
    parser.add_argument("--only", nargs="*", default=list(IMPLS), choices=list(IMPLS))
    parser.add_argument("--images", nargs="*", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--quick", action="store_true", help="a short look at CIFAR without views; nothing written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        job = json.loads(given.one)
        print(json.dumps(measure_here(job, given.data, given.workers, given.seconds, given.windows)))
        return
    if given.quick:
        given.repeats, given.windows, given.seconds, given.photographs = 1, 1, 0.5, 200
        given.views, given.images = [0], [*BATCH][: 1 if CIFAR.exists() else 2]
    rows = as_rows(run_all(given), given.workers)
    print(json.dumps(rows, indent=1))
    if not given.quick:
        write(ROOT / "bench" / "results" / "loaders.json", "loaders", rows)


def run_all(given: argparse.Namespace) -> dict[Job, dict[str, list[float]]]:
    """Every job in turn, again and again, so that a slow spell of the machine touches all alike."""
    options = [f"--{name}={getattr(given, name)}" for name in ("workers", "seconds", "windows")]
    results: dict[Job, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare(data, given.photographs if "photographs" in given.images else 0)
        for _ in range(given.repeats):
            for job in jobs(data, only=given.only, images=given.images, views=given.views):
                for metric, values in (measure(job, data, *options) or {}).items():
                    results.setdefault(job, {}).setdefault(metric, []).extend(values)
    return results


def as_rows(results: dict[Job, dict[str, list[float]]], workers: int) -> list[dict[str, Any]]:
    rows = []
    for (impl, images, views, crop), metrics in results.items():
        work: dict[str, Any] = {"images": images, "views": views, "batch": BATCH[images], "workers": workers}
        note = {}
        if views:
            work["crop"] = crop
            is_float = impl.startswith("fastssl") or impl == "ffcv-normalized"
            note = {"note": "float32, normalized" if is_float else "uint8"}
        rows += [row(impl, work, metric, values, **note) for metric, values in metrics.items()]
    return rows


if __name__ == "__main__":
    main()
