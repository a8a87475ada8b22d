"""What works on this machine, found by doing it, and where a recipe's time goes.

Choice made: nothing is believed for being installed. Every loader delivers a small set of images, every kind of image
is decoded, every format is written and read; what fails gives its reason, and the command that fixes it.
"""

import importlib
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastssl.augment.augment import Augment
from fastssl.augment.backend import backend_of
from fastssl.augment.policy import View
from fastssl.bench import stages
from fastssl.build.views import cuda_failure
from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.data.convert.convert import convert
from fastssl.data.decode import decode_image
from fastssl.data.formats import jpeg
from fastssl.data.loaders.choose import installed
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe, ViewSpec
from fastssl.runs.environment import cpu_name
from fastssl.runs.machine import cores, free_host_bytes

SIDE_PX, IMAGES = 24, 8
IMAGE_KINDS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG"},
    "WebP": {"format": "WEBP", "lossless": True},
    "TIFF": {"format": "TIFF"},
    "BMP": {"format": "BMP"},
    "GIF": {"format": "GIF"},
}


@dataclass(frozen=True)
class Check:
    """One thing that works here or does not.

    Attributes:
        kind: device, loader, format, image, compiler or augmentation.
        name: of the thing.
        works: it was tried and did what it should.
        detail: what was found, or why it does not work.
        fix: the command or setting that fixes it; "" when it works or cannot be fixed here.
    """

    kind: str
    name: str
    works: bool
    detail: str
    fix: str = ""


def examine(target: Recipe | Path | None = None) -> dict[str, Any]:
    """All checks, and the stages of a recipe's step (or of reading its data) with the slowest named.

    Args:
        target: a recipe, a .beton, a folder of shards, or None for the machine alone.

    Returns:
        JSON values: "checks", "stages", "slowest" (a stage's name or None) and "note" (or None).

    Raises:
        UserError: when the target is not sound.
    """
    timings, note = timed(target)
    worst = stages.slowest(timings)
    checks = [*devices(), *loaders(), *formats(), *image_kinds(), *compilers()]
    return {
        "checks": [asdict(check) for check in checks],
        "stages": [asdict(stage) for stage in timings],
        "slowest": worst.name if worst else None,
        "note": note,
    }


def timed(target: Recipe | Path | None) -> tuple[list[stages.Stage], str | None]:
    """The target's stages, and what is missing from them in one sentence."""
    if target is None:
        return [], None
    if isinstance(target, Recipe):
        absent = f"{target.data.path} is not converted yet: random images stood in, and reading was not timed."
        return stages.recipe_stages(target), None if target.data.path.exists() else absent
    note = "Give a recipe rather than its data to time augmentation and the network too."
    cpu = torch.device("cpu")
    if target.is_dir():
        recipe = load({"data": {"path": target, "batch_size": 64}, "train": {"epochs": 1}})
        return stages.stream_stages(recipe, cpu)[0], note
    return stages.data_stages(target, batch_size=256, threads=cores().count, device=cpu, once=False)[0], note


def attempt(kind: str, name: str, work: Callable[[], str], fix: str = "") -> Check:
    """A check of what `work` does: it returns what it found and raises when that does not do."""
    try:
        return Check(kind, name, True, work())
    except UserError as error:
        return Check(kind, name, False, error.what, fix or error.fix)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(kind, name, False, f"{type(error).__name__}: {error}".splitlines()[0], fix)


def devices() -> list[Check]:
    """The CPU, every CUDA device, and Apple's."""
    cpu = f"{cpu_name()}, {cores()}, {free_host_bytes() / 1e9:.3g} GB free"
    checks = [Check("device", "cpu", True, cpu)]
    if torch.cuda.is_available():
        checks += [attempt("device", f"cuda:{i}", partial(try_cuda, i)) for i in range(torch.cuda.device_count())]
    elif torch.version.cuda is None:
        checks.append(Check("device", "cuda", False, "this torch is built without CUDA", "Install torch's CUDA build."))
    else:
        checks.append(
            Check("device", "cuda", False, "no NVIDIA GPU responds", "Install the driver and check it with nvidia-smi.")
        )
    if platform.system() == "Darwin":
        checks.append(Check("device", "mps", torch.backends.mps.is_available(), "Apple's GPU"))
    return checks


def try_cuda(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    assert float(torch.ones(8, device=f"cuda:{index}").sum()) == 8
    return f"{torch.cuda.get_device_name(index)}, {free / 1e9:.3g} of {total / 1e9:.3g} GB free"


def loaders() -> list[Check]:
    """Each loader over the same JPEGs; right when its pixels are those of our decoder."""

    def work(name: str, path: Path, options: dict[str, Any]) -> str:
        module = importlib.import_module(
            f"fastssl.data.loaders.{name}"
        )  # raises a UserError where its package is absent
        return same_pixels(module.open_loader(path, **options), path)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doctor.beton"
        write_jpegs(path)
        options = {"device": "cpu", "batch_size": IMAGES, "order": lambda epoch: torch.arange(IMAGES), "threads": 2}
        names = ("resident", "ffcv", "dali")
        return [attempt("loader", name, partial(work, name, path, options)) for name in names]


def write_jpegs(path: Path) -> None:
    with BetonWriter(path, mode="jpg") as writer:
        for i in range(IMAGES):
            writer.add(picture(i), i)


def picture(i: int) -> np.ndarray:
    """Smooth and different for each i: uint8 (H, W, 3)."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    return np.stack([x * 7 + i * 3, y * 5 + i * 11, x + y], axis=2).astype(np.uint8)


def same_pixels(loader: Any, path: Path) -> str:
    (batch,) = loader.epoch(0)
    if not np.array_equal(batch.images.numpy(), np.stack([Beton(path).image(i) for i in range(IMAGES)])):
        raise ValueError("its pixels differ from those of our decoder")
    return "delivered a batch with the right pixels"


def formats() -> list[Check]:
    """What convert can read and write here."""
    with tempfile.TemporaryDirectory() as folder:
        beton, shards, back = (Path(folder) / name for name in ("a.beton", "shards", "b.beton"))

        def try_beton() -> str:
            convert("shapes", beton, count=IMAGES, workers=1)
            return f"wrote and read {len(Beton(beton))} images"

        def try_shards() -> str:
            convert("shapes", shards, format="webdataset", count=IMAGES, workers=1)
            return f"wrote and read {convert(shards, back, workers=1).count} images"

        checks = [attempt("format", ".beton", try_beton), attempt("format", "WebDataset shards", try_shards)]
    parquet = installed("pyarrow")
    detail = "pyarrow is there" if parquet else "pyarrow is not installed"
    fix = "" if parquet else "pip install 'fastssl-vision[parquet]'"
    return [*checks, Check("format", "Parquet", parquet, detail, fix)]


def image_kinds() -> list[Check]:
    """Decodes one image of each kind."""
    checks = [attempt("image", "JPEG", lambda: size_of(jpeg.encode(picture(0), quality=90)))]
    for name, options in IMAGE_KINDS.items():

        def work(options: dict[str, Any] = options) -> str:
            file = io.BytesIO()
            Image.fromarray(picture(0)).save(file, **options)
            return size_of(file.getvalue())

        checks.append(attempt("image", name, work, "pip install --force-reinstall Pillow"))
    return checks


def size_of(data: bytes) -> str:
    height, width, channels = decode_image(data, key="image", channels=3).shape
    assert (height, width, channels) == (SIDE_PX, SIDE_PX, 3)
    return "decoded"


def compilers() -> list[Check]:
    """What torch.compile needs here."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    detail = compiler or "none is found, so train.compile does not work on the CPU"
    checks = [Check("compiler", "C++", bool(compiler), detail, "" if compiler else "apt-get install g++")]
    if torch.cuda.is_available():
        triton = installed("triton")
        detail = "for the CUDA backend and train.compile" if triton else "not installed"
        checks.append(Check("compiler", "Triton", triton, detail, "" if triton else "pip install triton"))
        checks.append(fused_kernels(torch.device("cuda")))
    return checks


def fused_kernels(device: torch.device) -> Check:
    """Whether `augment.backend: auto` is the CUDA backend here, found by compiling and running its kernels."""
    row = View(**ViewSpec(crop="random_resized", jitter_p=0.8, brightness=0.4, contrast=0.4, hue=0.1).model_dump())
    reason = cuda_failure(Augment((row, row), (0.5,) * 3, (0.25,) * 3, 0, torch.bfloat16, backend_of("torch")), device)
    if reason is None:
        return Check("augmentation", "auto", True, "the CUDA backend: its kernels compile and run")
    return Check("augmentation", "auto", False, f"the torch backend: {reason}", "Install another version of Triton.")
