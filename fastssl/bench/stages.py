"""Where a step's time goes: every stage of the data's path timed alone, with the recipe's data, device and threads.

Choice made: a stage is timed on more and more images until one call takes long enough to be believed, so that a tiny
recipe is done in seconds and a large one is not run to its full batch. In training the stages overlap (images are
read, decoded and copied one batch ahead), so the slowest one bounds the rate; their times do not simply add up.

B images, V views, H W height and width in pixels, C channels.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl import build
from fastssl.augment.draws import permutation
from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.loaders import layout
from fastssl.data.loaders.threads import spread
from fastssl.data.loaders.transfer import moved
from fastssl.data.manifest import Manifest
from fastssl.recipe.schema import Recipe
from fastssl.runs.machine import cores
from fastssl.training.step import step_of

ENOUGH_S = 0.4  # a call of this length is timed well enough
FIRST_IMAGES = 4
STAND_IN_SIDE_PX, STAND_IN_IMAGES = 256, 256  # random images stand in for data that is still to be converted


@dataclass(frozen=True)
class Stage:
    """One stage's rate.

    Attributes:
        name: read, decode, copy, augment, forward or backward.
        work: what was timed, in words.
        images: of the timed call.
        images_per_s: of the timed call.
        once: it happens when the loader opens the file, and in no step.
    """

    name: str
    work: str
    images: int
    images_per_s: float
    once: bool = False


def slowest(stages: list[Stage]) -> Stage | None:
    """The stage of a step with the lowest rate, None without any."""
    return min((stage for stage in stages if not stage.once), key=lambda stage: stage.images_per_s, default=None)


def recipe_stages(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe's step; without read, decode and copy while its data is still to be converted.

    Raises:
        UserError: when the recipe cannot work here, or its file is not sound.
    """
    device, path = build.hardware.device(recipe), recipe.data.path
    build.views.check_backend(recipe, device)
    if path.is_dir():
        stages, batch = stream_stages(recipe, device)
        manifest = build.data.manifest_of(path)
    elif path.exists():
        once = build.data.loader_choice(recipe, path, device)[0] == "resident" and recipe.data.memory != "mmap"
        threads = recipe.data.workers or cores().count
        stages, batch = data_stages(path, batch_size=recipe.data.batch_size, threads=threads, device=device, once=once)
        manifest = build.data.manifest_of(path)
    else:
        stages, batch = [], stand_in(recipe, device)
        manifest = Manifest(count=0, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, digest="", classes=())
    augment = build.views.augment(recipe, manifest, device=device)
    groups: tuple[Tensor, ...] = ()

    def make_views(images: int) -> list[float]:
        nonlocal groups
        part = first_of(batch, images)
        start = now(device)
        groups = augment(part, 0)
        return [now(device) - start]

    works = [f"{len(augment.views)} views by the {augment.backend.name} backend"]
    stages += as_stages(["augment"], works, growing(make_views, len(batch)))
    return stages + network_stages(recipe, groups, channels=manifest.channels, device=device)


def stream_stages(recipe: Recipe, device: torch.device) -> tuple[list[Stage], Batch]:
    """Read, which decodes too, of a folder of shards by DALI's own reader, after its first batch; and a batch."""
    start, images, batch = now(device), 0, None
    for step, batch in enumerate(build.data.stream(recipe, recipe.data.path, device=device).epoch(0)):
        images += len(batch)
        seconds = now(device) - start
        if step and seconds > ENOUGH_S:
            break
        if step == 0:
            start, images = now(device), 0
    assert batch is not None
    timing = (images, [seconds]) if images else (len(batch), [seconds])  # one batch is the epoch: with its start-up
    return as_stages(["read"], ["read and decoded by DALI's own reader"], timing), batch


def data_stages(
    path: Path, *, batch_size: int, threads: int, device: torch.device, once: bool
) -> tuple[list[Stage], Batch]:
    """Read, decode (where something is JPEG) and copy, and a batch of the file's images on the device.

    Args:
        path: a .beton.
        batch_size: the most images to take.
        threads: that decode.
        device: device that the batch is copied to.
        once: the loader reads and decodes the file only when it opens.

    Raises:
        UserError: when the file or one of its images is not sound.
    """
    beton = Beton(path)
    index_B = permutation(0, 0, len(beton))[:batch_size]
    index, most = index_B.numpy(), min(batch_size, len(beton))
    sizes_B2 = beton.sizes[index]
    ends = layout.ends_of(sizes_B2, beton.channels)
    flat = layout.empty(int(ends[-1]), beton.dtype, pin=device.type == "cuda")
    pixels = flat.numpy()

    def read(images: int) -> list[float]:
        start = time.perf_counter()
        if beton.is_raw:
            beton.read_raw(pixels[: ends[images]], index[:images])
        else:
            for i in index[:images].tolist():
                bytes(beton.encoded(i)[1])
        return [time.perf_counter() - start]

    def decode(images: int) -> list[float]:
        def decode_image(k: int) -> None:
            pixels[ends[k] : ends[k + 1]] = beton.image(int(index[k])).reshape(-1)

        start = time.perf_counter()
        spread(decode_image, images, threads)
        return [time.perf_counter() - start]

    def copy(images: int) -> list[float]:
        start = now(device)
        flat[: ends[images]].to(device, copy=True)
        return [now(device) - start]

    forget(path)
    stages = as_stages(["read"], [f"stored bytes of {most} images, in random order"], (most, read(most)), once=once)
    if not beton.is_raw:
        stages += as_stages(["decode"], [f"JPEG by {threads} threads"], growing(decode, most), once=once)
    stages += as_stages(["copy"], [f"pixels into a batch on {device}"], growing(copy, most))
    return stages, moved(layout.as_batch(flat, index_B, sizes_B2, beton.channels, layout.image_shape(beton)), device)


def network_stages(recipe: Recipe, groups: tuple[Tensor, ...], *, channels: int, device: torch.device) -> list[Stage]:
    """Forward (with the loss) and backward (with the update) of these views."""
    network = build.model.network(recipe, in_channels=channels, device=device)
    step = step_of(recipe, network, device=device)

    def run(images: int) -> list[float]:
        part = [group[:, :images] for group in groups]
        start = now(device)
        terms = step.forward(part)
        middle = now(device)
        step.backward(terms)
        step.update()
        return [middle - start, now(device) - middle]

    name = f"{recipe.model.backbone} in {build.hardware.precision(recipe)}"
    works = [f"{name}, {recipe.loss.name}", f"the same, and {recipe.optim.name}"]
    least = build.model.few_images(recipe, FIRST_IMAGES)
    return as_stages(["forward", "backward"], works, growing(run, groups[0].shape[1], least=least))


def growing(run: Callable[[int], list[float]], most: int, *, least: int = FIRST_IMAGES) -> tuple[int, list[float]]:
    """Runs on more and more images, the first time unmeasured; how many the last run took, and its seconds."""
    images = min(least, most)
    run(images)
    while True:
        seconds = run(images)
        if images == most or sum(seconds) > ENOUGH_S:
            return images, seconds
        images = min(most, 4 * images)


def as_stages(
    names: list[str], works: list[str], timing: tuple[int, list[float]], *, once: bool = False
) -> list[Stage]:
    images, seconds = timing
    return [
        Stage(name, work, images, images / max(s, 1e-9), once)
        for name, work, s in zip(names, works, seconds, strict=True)
    ]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    build.hardware.wait(device)
    return time.perf_counter()


def first_of(batch: Batch, images: int) -> Batch:
    """The batch's first images."""

    def first(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:images]

    pixels = batch.images if batch.offsets_B is not None else batch.images[:images]
    labels_B, index_B = batch.labels_B[:images], batch.index_B[:images]
    return Batch(pixels, labels_B, index_B, first(batch.sizes_B2), first(batch.offsets_B))


def stand_in(recipe: Recipe, device: torch.device) -> Batch:
    """Random images of the recipe's side."""
    side, batch = recipe.data.side_px or STAND_IN_SIDE_PX, min(recipe.data.batch_size, STAND_IN_IMAGES)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8))
    index_B = torch.arange(batch, device=device)
    return Batch(images.to(device), torch.full_like(index_B, -1), index_B)


def forget(path: Path) -> None:
    """Asks the system to drop the file from its cache, so that reading reads the disk; where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
