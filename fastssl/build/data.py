"""From a recipe to its images: files made where they are missing, images shared out, loaders opened.

The half of `build` that deals with data; everything here is also there.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Unpack

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import draws
from fastssl.build import ranks, views
from fastssl.build.checks import check_batch, check_stream
from fastssl.data.batch import Batch
from fastssl.data.beton.reader import Beton
from fastssl.data.convert import convert
from fastssl.data.loaders import resident
from fastssl.data.loaders.choose import choose, installed
from fastssl.data.loaders.loader import BetonLoader
from fastssl.data.loaders.plan import PlanOptions
from fastssl.data.manifest import Manifest, check_belongs, manifest_path, read_manifest
from fastssl.data.sources import open_source
from fastssl.errors import UserError, option
from fastssl.recipe.schema import Recipe
from fastssl.runs.machine import free_host_bytes

# Which images are held out or left out must not change with the run's seed, or runs could not be compared.
SPLIT_SEED = 0x5EED


class Loader(Protocol):
    """What every loader is to the loop: steps per epoch, and the batches of an epoch from a step on."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Sets:
    """Positions of images in their files: for pretraining, for the probes to learn from, and held out."""

    train: Tensor
    probe: Tensor
    val: Tensor


def images_to_train_on(recipe: Recipe, count: int) -> int:
    """How many of `count` labeled images are pretrained on; probes with a file of their own hold none of these out."""
    held_out = recipe.data.val_count if recipe.data.probe_path is None else 0
    return round((count - held_out) * recipe.data.fraction)


def images_per_epoch(recipe: Recipe, loader: Loader, images: int) -> int:
    """How many of the images to train on come in one epoch."""
    return len(loader) * recipe.data.batch_size if recipe.data.drop_last else images


def ensure_data(
    recipe: Recipe, *, progress: Callable[[str, int, int | None], None] | None = None, only_train: bool = False
) -> list[Path]:
    """Converts each of the recipe's files that is absent and whose source is known; returns the files made.

    Args:
        recipe: names files and source.
        progress: called with (file, images done, images in all).
        only_train: leave the probes' and the test file alone.

    Raises:
        UserError: when a file is absent and no source is given.
    """
    data, converted = recipe.data, []
    wanted: list[tuple[Path | None, str, int | None]] = [(data.path, data.split, data.count)]
    if not only_train:
        wanted.append((data.probe_path, data.probe_split, data.count))
        wanted.append((data.test_path, data.test_split, data.test_count))
    absent = [(path, split, count) for path, split, count in wanted if path is not None and not path.exists()]
    if absent and data.source is None:
        raise UserError(
            f"{absent[0][0]} does not exist.", "Set data.path to a .beton file, or data.source to what to convert."
        )
    for _, split, count in absent[1:]:  # a split that is not there is found before hours of converting the first
        open_source(str(data.source), split=split, root=data.root, download=data.download, count=count)
    for path, split, count in absent:
        convert.convert(
            str(data.source),
            path,
            split=split,
            side_px=data.side_px,
            count=count,
            on_error=data.on_error,
            workers=data.workers or None,
            root=data.root,
            download=data.download,
            progress=partial(progress, str(path)) if progress else None,
        )
        converted.append(path)
    return converted


def ensure_data_once(recipe: Recipe, *, progress: Callable[[str, int, int | None], None] | None = None) -> None:
    """As `ensure_data` on every rank: rank 0 first, then the first rank of any machine that still lacks the files."""
    if ranks.is_main():
        ensure_data(recipe, progress=progress)
    ranks.barrier()
    if ranks.local_rank() == 0 and not ranks.is_main():
        ensure_data(recipe)
    ranks.barrier()


def sets(recipe: Recipe, labels_N: Tensor, probe_labels_N: Tensor) -> Sets:
    """Splits the files' images. Held-out images are never pretrained on when both come from one file.

    Raises:
        UserError: when too few images are left.
    """
    data = recipe.data
    if data.path.is_dir():
        check_stream(recipe)
    check_channels(recipe)
    check_test(recipe, probe_labels_N)
    probe, val = labeled_parts(recipe, probe_labels_N)
    pool = torch.arange(len(labels_N))
    if data.probe_path is None:
        pool = pool[~torch.isin(pool, val)]
    chosen = draws.permutation(SPLIT_SEED, 1, len(pool))[: max(1, round(len(pool) * data.fraction))]
    train = pool[chosen].sort().values
    check_batch(recipe, len(train))
    return Sets(train=train, probe=probe, val=val)


def labeled_parts(recipe: Recipe, probe_labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the labeled images that probes learn from, and of those held out.

    Raises:
        UserError: when all of them would be held out.
    """
    count = recipe.data.val_count
    labeled = torch.nonzero(probe_labels_N >= 0).flatten()
    shuffled = labeled[draws.permutation(SPLIT_SEED, 0, len(labeled))]
    if count and count >= len(labeled) > 0:
        raise UserError(
            f"data.val_count {count} holds out all of the {len(labeled)} labeled images.",
            "Set data.val_count lower.",
        )
    return shuffled[count:].sort().values, shuffled[:count].sort().values


def of_known_classes(labels_N: Tensor, learn: Tensor, held: Tensor) -> tuple[Tensor, str]:
    """The held-out images whose class an image to learn from has, and a sentence about the others, empty if none.

    Args:
        labels_N: of the file.
        learn: positions of the images to learn from.
        held: positions of the images held out.
    """
    known = held[torch.isin(labels_N[held], labels_N[learn])]
    if len(known) == len(held):
        return held, ""
    left_out = f"{len(held) - len(known)} of {len(held)} held-out images"
    return known, f"{left_out} are of classes without an image to learn from, and are left out."


def check_channels(recipe: Recipe) -> None:
    """Refuses a probes' or test file that is there and whose images the network cannot take.

    Raises:
        UserError: naming the file.
    """
    data = recipe.data
    channels = manifest_of(data.path).channels
    for path in (data.probe_path, data.test_path):
        if path is not None and path.exists() and manifest_of(path).channels != channels:
            raise UserError(
                f"{path} has images of {manifest_of(path).channels} channels, {data.path} of {channels}.",
                f"Convert it again with {option('channels', channels)}.",
            )


def check_test(recipe: Recipe, probe_labels_N: Tensor) -> None:
    """Refuses a test file that is there and has no labels, or classes that the probes cannot learn or number otherwise.

    Raises:
        UserError: naming a class.
    """
    test_path, probe_path = recipe.data.test_path, recipe.data.probe_path or recipe.data.path
    if test_path is None or not test_path.exists() or not bool((probe_labels_N >= 0).any()):
        return
    learned, tested = (manifest_of(path).classes for path in (probe_path, test_path))
    known, labels = set(probe_labels_N.tolist()), set(labels_of(test_path).tolist()) - {-1}
    if not labels:
        raise UserError(f"No image of {test_path} has a label.", "Set data.test_path to a labeled .beton, or to null.")
    for label in sorted(labels):
        name = class_name(tested, label)
        other = class_name(learned, label)
        same = name == other or name.isdigit() != other.isdigit()  # one of the two files names its classes by number
        if label not in known or not same:
            raise UserError(
                f"{test_path} has images of class {name} with label {label}, and {probe_path} has "
                + (f"{class_name(learned, label)} there." if label in known else "none of that label to learn from."),
                f"Convert it again with {option('classes', manifest_path(probe_path))}, from images of the same "
                "classes.",
            )


def class_name(classes: Sequence[str], label: int) -> str:
    """A class's name, its number where it has none."""
    return classes[label] if label < len(classes) else str(label)


def some_of(indices: Tensor, count: int | None) -> Tensor:
    """At most `count` of the indices, the same ones in every run, in their order."""
    if count is None or count >= len(indices):
        return indices
    return indices[draws.permutation(SPLIT_SEED, 2, len(indices))[:count]].sort().values


def loader(recipe: Recipe, path: Path, indices: Tensor, *, device: torch.device) -> Loader:
    """Shuffled batches for pretraining; each rank gets its part of the same global batches.

    A folder of shards is streamed whole, in the stream's order.
    """
    if path.is_dir():
        return stream(recipe, path, device=device)
    return open_loader(
        recipe,
        path,
        device=device,
        batch_size=recipe.data.batch_size,
        order=partial(shuffled_order, recipe.seed, len(indices)),
        indices=indices,
        drop_last=recipe.data.drop_last,
        rank=ranks.rank(),
        world=ranks.world(),
    )


def stream(recipe: Recipe, folder: Path, *, device: torch.device) -> Loader:
    """DALI's own reader over a folder of shards.

    Raises:
        UserError: when DALI is not installed or the recipe asks for another loader.
    """
    loader_choice(recipe, folder, device)
    from fastssl.data.loaders.dali_shards import open_stream

    manifest, data = manifest_of(folder), recipe.data
    size, channels = manifest.size_max_px, manifest.channels
    uniform = size is not None and manifest.size_min_px == size
    return open_stream(
        folder,
        device=device,
        batch_size=data.batch_size,
        order=partial(draws.permutation, recipe.seed),
        seed=recipe.seed,
        drop_last=data.drop_last,
        rank=ranks.rank(),
        world=ranks.world(),
        threads=data.workers or None,
        layout=data.layout,
        channels=channels,
        image_shape=(*size, channels) if uniform and size else None,
    )


def ordered_loader(
    recipe: Recipe,
    path: Path,
    indices: Tensor | None,
    *,
    device: torch.device,
    share: Loader | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches in the order of `indices` (the file's when None), the last one short, for evaluation.

    Args:
        recipe: decides the loader and the batch size.
        path: the file.
        indices: positions in the file.
        device: device of the batches.
        share: an open loader of the same file, whose memory is then used.
        rank, world: which contiguous part of the images, as `distributed.shard` cuts; parts differ by one at most
            and none is padded.

    Raises:
        UserError: when a part would be empty.
    """
    chosen = torch.arange(len(labels_of(path))) if indices is None else indices
    count = len(chosen)
    part = chosen[count * rank // world : count * (rank + 1) // world]
    plan = PlanOptions(
        batch_size=recipe.evaluate.batch_size, order=partial(file_order, len(part)), indices=part, drop_last=False
    )
    return share.subset(**plan) if isinstance(share, BetonLoader) else open_loader(recipe, path, device=device, **plan)


def open_loader(recipe: Recipe, path: Path, *, device: torch.device, **plan: Unpack[PlanOptions]) -> BetonLoader:
    """The recipe's loader over a file."""
    data, threads, beton = recipe.data, recipe.data.workers or None, Beton(path)
    check_belongs(manifest_of(path), path, count=len(beton), channels=beton.channels)
    match loader_choice(recipe, path, device)[0]:
        case "ffcv":
            from fastssl.data.loaders import ffcv

            return ffcv.open_loader(path, device=device, threads=threads, layout=data.layout, **plan)
        case "dali":
            from fastssl.data.loaders import dali

            return dali.open_loader(path, device=device, threads=threads, layout=data.layout, **plan)
        case _:
            return resident.open_loader(
                path,
                device=device,
                threads=threads,
                memory=data.memory,
                layout=data.layout,
                in_place=views.reads_in_place(recipe, device),
                **plan,
            )


def loader_choice(recipe: Recipe, path: Path, device: torch.device) -> tuple[str, str]:
    """Name of the loader and one sentence why.

    Raises:
        UserError: when the recipe asks for one that is not installed.
    """
    wanted = recipe.data.loader
    if path.is_dir() and (wanted not in ("auto", "dali") or not installed("nvidia.dali")):
        raise UserError(
            f"{path} is a folder, and only the dali loader streams a folder of shards.",
            "Run `pip install 'fastssl-vision[dali]'` and set data.loader to dali, or convert the folder to a .beton.",
        )
    packages = {"ffcv": "ffcv", "dali": "nvidia.dali"}
    if wanted in packages and not installed(packages[wanted]):
        raise UserError(
            f"data.loader is {wanted}, but it is not installed.",
            f"Run `pip install 'fastssl-vision[{wanted}]'`, or set data.loader to auto.",
        )
    if path.is_dir():
        return "dali", "a folder of shards is streamed by DALI's own reader"
    if wanted != "auto":
        return wanted, "the recipe says so"
    if recipe.data.memory == "mmap" or (recipe.data.memory == "host" and device.type != "cpu"):
        return "resident", f"data.memory is {recipe.data.memory}, and the others keep no pixels"
    beton = Beton(path)
    # The ranks of a machine share its memory; a GPU is one rank's own.
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes() // ranks.local_world()
    return choose(
        int(beton.sizes.prod(axis=1).sum()) * beton.channels * beton.dtype.itemsize,
        is_jpeg=not beton.is_raw,
        device=device.type,
        free_bytes=free,
        has_ffcv=installed("ffcv"),
        has_dali=installed("nvidia.dali"),
    )


def file_order(count: int, epoch: int) -> Tensor:
    return torch.arange(count)


def shuffled_order(seed: int, count: int, epoch: int) -> Tensor:
    return draws.permutation(seed, epoch, count)


def manifest_of(path: Path) -> Manifest:
    """The manifest that `convert` wrote next to a file.

    Raises:
        UserError: when it is absent or damaged.
    """
    make_it = f"fastssl convert {shlex.quote(str(path))} OTHER.beton"
    fix = f"Make it with `{make_it}`, which reads any .beton, and set data.path to OTHER.beton."
    try:
        return read_manifest(path)
    except FileNotFoundError:
        raise UserError(f"{path} has no manifest {manifest_path(path).name} next to it.", fix) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest_path(path)} is damaged: {error}.", fix) from error


def labeled_rows(path: Path) -> Tensor:
    """Positions of the labeled images of a file."""
    return torch.nonzero(labels_of(path) >= 0).flatten()


def labels_of(path: Path) -> Tensor:
    """Labels of a .beton file, int64 (N,), -1 where there is none, as for every sample of a folder of shards."""
    if path.is_dir():
        return torch.full((manifest_of(path).count,), -1, dtype=torch.int64)
    return torch.from_numpy(np.array(Beton(path).labels, dtype=np.int64))
