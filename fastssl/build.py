"""From a recipe to the objects of a run: the only place that chooses which part does what."""

import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastssl import distributed, losses, models, optim
from fastssl.augment import draws
from fastssl.augment.engine import Augment
from fastssl.augment.policy import View
from fastssl.data import convert
from fastssl.data.batch import Batch
from fastssl.data.beton import Beton
from fastssl.data.choose import choose, free_host_bytes, installed
from fastssl.data.manifest import manifest_path
from fastssl.data.resident import Resident
from fastssl.errors import UserError
from fastssl.recipe import Recipe, VicReg, ViewSpec, view_table

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


def device(recipe: Recipe) -> torch.device:
    """The recipe's device; auto prefers cuda, then mps, then cpu.

    Raises:
        UserError: when it is asked for and absent.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if recipe.device == "auto":
        name = next(name for name in ("cuda", "mps", "cpu") if available[name])
    elif available[recipe.device]:
        name = recipe.device
    else:
        raise UserError(
            f"device is {recipe.device}, but torch finds none on this machine.", "Set device to auto or cpu."
        )
    return torch.device(name, distributed.local_rank()) if name == "cuda" else torch.device(name)


def autocast(recipe: Recipe) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[recipe.train.precision]


def check(recipe: Recipe) -> None:
    """What can be refused before any data is read or converted: the device, the backbone, a set known to be too small.

    Raises:
        UserError: naming the field.
    """
    device(recipe)
    if recipe.model.backbone not in models.RESNETS:
        near = difflib.get_close_matches(recipe.model.backbone, models.RESNETS, n=1)
        raise UserError(
            f"model.backbone {recipe.model.backbone!r} is unknown" + (f", did you mean {near[0]}?" if near else "."),
            "Set model.backbone to one of " + ", ".join(models.RESNETS) + ".",
        )
    if recipe.data.count and not recipe.data.path.exists():
        check_batch(recipe, round((recipe.data.count - recipe.data.val_count) * recipe.data.fraction))


def check_batch(recipe: Recipe, images: int) -> None:
    if images < recipe.data.batch_size:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} is larger than the {max(0, images)} images to train on.",
            f"Set data.batch_size to {max(2, images)} or lower, or add images.",
        )


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
    data, made = recipe.data, []
    wanted: list[tuple[Path | None, str, int | None]] = [(data.path, data.split, data.count)]
    if not only_train:
        wanted.append((data.probe_path, data.probe_split, data.count))
        wanted.append((data.test_path, data.test_split, data.test_count))
    for path, split, count in wanted:
        if path is None or path.exists():
            continue
        if data.source is None:
            raise UserError(
                f"{path} does not exist.", "Set data.path to a .beton file, or data.source to what to convert."
            )
        convert.convert(
            data.source,
            path,
            split=split,
            side_px=data.side_px,
            count=count,
            workers=data.workers or None,
            root=data.root,
            download=data.download,
            progress=partial(progress, str(path)) if progress else None,
        )
        made.append(path)
    return made


def sets(recipe: Recipe, labels_N: Tensor, probe_labels_N: Tensor) -> Sets:
    """Splits the files' images. Held-out images are never pretrained on when both come from one file.

    Raises:
        UserError: when too few images are left.
    """
    data = recipe.data
    probe, val = labelled_parts(recipe, probe_labels_N)
    pool = torch.arange(len(labels_N))
    if data.probe_path is None:
        pool = pool[~torch.isin(pool, val)]
    chosen = draws.permutation(SPLIT_SEED, 1, len(pool))[: max(1, round(len(pool) * data.fraction))]
    train = pool[chosen].sort().values
    check_batch(recipe, len(train))
    return Sets(train=train, probe=probe, val=val)


def labelled_parts(recipe: Recipe, probe_labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the labelled images that probes learn from, and of those held out.

    Raises:
        UserError: when all of them would be held out.
    """
    count = recipe.data.val_count
    labelled = torch.nonzero(probe_labels_N >= 0).flatten()
    shuffled = labelled[draws.permutation(SPLIT_SEED, 0, len(labelled))]
    if count and count >= len(labelled) > 0:
        raise UserError(
            f"data.val_count {count} holds out all of the {len(labelled)} labelled images.",
            "Set data.val_count lower.",
        )
    return shuffled[count:].sort().values, shuffled[:count].sort().values


def some_of(indices: Tensor, count: int | None) -> Tensor:
    """At most `count` of the indices, the same ones in every run, in their order."""
    if count is None or count >= len(indices):
        return indices
    return indices[draws.permutation(SPLIT_SEED, 2, len(indices))[:count]].sort().values


def loader(recipe: Recipe, path: Path, indices: Tensor, *, where: torch.device) -> Loader:
    """Shuffled batches for pretraining; each rank gets its part of the same global batches."""
    return open_loader(
        recipe,
        path,
        where=where,
        batch_size=recipe.data.batch_size,
        order=partial(shuffled_order, recipe.seed, len(indices)),
        indices=indices,
        drop_last=True,
        rank=distributed.rank(),
        world=distributed.world(),
    )


def ordered_loader(
    recipe: Recipe, path: Path, indices: Tensor | None, *, where: torch.device, share: Loader | None = None
) -> Loader:
    """Batches in the file's order, the last one short, for evaluation; `share` is an open loader of the same file."""
    batch_size = recipe.evaluate.batch_size
    if isinstance(share, Resident):
        return share.subset(indices, batch_size=batch_size)
    count = len(labels_of(path)) if indices is None else len(indices)
    order = partial(file_order, count)
    return open_loader(recipe, path, where=where, batch_size=batch_size, order=order, indices=indices, drop_last=False)


def open_loader(recipe: Recipe, path: Path, *, where: torch.device, **plan: Any) -> Loader:
    """The recipe's loader over a file; see `Resident.open` for the plan."""
    threads = recipe.data.workers or None
    match loader_choice(recipe, path, where)[0]:
        case "ffcv":
            from fastssl.data.ffcv import Ffcv

            return Ffcv.open(path, device=where, threads=threads, **plan)
        case "dali":
            from fastssl.data.dali import Dali

            return Dali.open(path, device=where, threads=threads, **plan)
        case _:
            return Resident.open(path, device=where, threads=threads, memory=recipe.data.memory, **plan)


def loader_choice(recipe: Recipe, path: Path, where: torch.device) -> tuple[str, str]:
    """Name of the loader and one sentence why.

    Raises:
        UserError: when the recipe asks for one that is not installed.
    """
    wanted = recipe.data.loader
    packages = {"ffcv": "ffcv", "dali": "nvidia.dali"}
    if wanted in packages and not installed(packages[wanted]):
        raise UserError(
            f"data.loader is {wanted}, but it is not installed.",
            f"Run pip install 'fastssl-vision[{wanted}]', or set data.loader to auto.",
        )
    if wanted != "auto":
        return wanted, "the recipe says so"
    beton = Beton(path)
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else free_host_bytes()
    return choose(
        int(beton.sizes.prod(axis=1).sum()) * beton.channels * beton.dtype.itemsize,
        is_jpeg=not beton.is_raw,
        device=where.type,
        free_bytes=free,
        has_ffcv=installed("ffcv"),
        has_dali=installed("nvidia.dali"),
    )


def file_order(count: int, epoch: int) -> Tensor:
    return torch.arange(count)


def shuffled_order(seed: int, count: int, epoch: int) -> Tensor:
    return draws.permutation(seed, epoch, count)


def views(recipe: Recipe) -> tuple[View, ...]:
    return tuple(View(**spec.model_dump()) for spec in view_table(recipe.augment))


def augment(recipe: Recipe, manifest: dict[str, Any], *, where: torch.device) -> Augment:
    """The recipe's view table, normalised by the data's own mean and standard deviation."""
    return make_augment(recipe, views(recipe), manifest, where=where)


def clean_view(recipe: Recipe, manifest: dict[str, Any], *, where: torch.device) -> Augment:
    """One view that changes nothing but the size, the largest centred square of the image, for evaluation."""
    side_px = recipe.evaluate.side_px or manifest["side_px"] or recipe.augment.side_px
    return make_augment(recipe, (View(**ViewSpec(side_px=side_px, crop="center").model_dump()),), manifest, where=where)


def make_augment(recipe: Recipe, rows: tuple[View, ...], manifest: dict[str, Any], *, where: torch.device) -> Augment:
    applier: Literal["torch", "cpu", "cuda"]
    if recipe.augment.applier == "auto":
        applier = "cpu" if where.type == "cpu" else "cuda" if where.type == "cuda" else "torch"
    else:
        applier = recipe.augment.applier
    return Augment(
        views=rows,
        mean_C=tuple(manifest["mean"]),
        std_C=tuple(max(float(s), 1e-3) for s in manifest["std"]),
        seed=recipe.seed,
        dtype=autocast(recipe) or torch.float32,
        applier=applier,
    )


def network(recipe: Recipe, *, in_channels: int, where: torch.device) -> models.Pretrainer:
    """Backbone and projector with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    backbone = models.backbone(
        recipe.model.backbone, stem=recipe.model.stem, width=recipe.model.width, in_channels=in_channels
    )
    both = models.Pretrainer(backbone, models.projector(backbone.features_dim, widths=recipe.model.projector))
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    return both.to(where).to(memory_format=layout)


def loss(recipe: Recipe) -> Callable[[Tensor], dict[str, Tensor]]:
    """The recipe's loss with its weight resolved and its sums over ranks."""
    spec, weight = recipe.loss, orthogonality(recipe)
    if isinstance(spec, VicReg):
        return partial(losses.vicreg, invariance=weight, variance=weight, covariance=1.0, **over_ranks())
    return partial(
        losses.barlow_twins,
        orthogonality=weight,
        form=spec.form,
        standardise=spec.standardise,
        l2_normalise=spec.l2_normalise,
        **over_ranks(),
    )


def over_ranks() -> dict[str, Any]:
    return {"all_sum": distributed.all_sum} if distributed.world() > 1 else {}


def orthogonality(recipe: Recipe) -> float:
    """The loss's weight: the recipe's number, or the rule's for its D and V."""
    spec = recipe.loss
    if spec.orthogonality != "auto":
        return float(spec.orthogonality)
    form = "leave_one_out" if isinstance(spec, VicReg) else spec.form
    return losses.orthogonality_rule(spec.name, recipe.model.projector[-1], len(view_table(recipe.augment)), form=form)


def collapse_risk(recipe: Recipe) -> str | None:
    """One sentence when the recipe's weight is far above the rule's for its D, else None."""
    if not recipe.model.projector:
        return None
    spec, dim, views = recipe.loss, recipe.model.projector[-1], len(view_table(recipe.augment))
    form = "leave_one_out" if isinstance(spec, VicReg) else spec.form
    return losses.collapse_risk(spec.name, orthogonality(recipe), dim, views, form=form)


def optimizer(recipe: Recipe, module: torch.nn.Module, *, where: torch.device) -> torch.optim.Optimizer:
    spec = recipe.optim
    groups = optim.parameter_groups([module], weight_decay=spec.weight_decay)
    return optim.optimizer(
        spec.name, groups, lr=spec.lr, momentum=spec.momentum, betas=spec.betas, trust=spec.trust, device=where
    )


def learning_rate(recipe: Recipe, *, steps_per_epoch: int) -> Callable[[int], float]:
    """Step to learning rate."""
    spec = recipe.optim
    return partial(
        optim.learning_rate,
        base=spec.lr,
        warmup_steps=math.ceil(spec.warmup_epochs * steps_per_epoch),
        total_steps=recipe.train.epochs * steps_per_epoch,
        schedule=spec.schedule,
        final_fraction=spec.final_fraction,
    )


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest that `convert` wrote beside a file.

    Raises:
        UserError: when it is absent or damaged.
    """
    fix = (
        f"Make it with `fastssl convert {path} OTHER.beton`, which reads any .beton, and set data.path to OTHER.beton."
    )
    try:
        manifest: dict[str, Any] = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        if len(manifest["mean"]) != manifest["channels"] or len(manifest["std"]) != manifest["channels"]:
            raise ValueError
        str(manifest["digest"]), manifest["side_px"], manifest["classes"]
    except FileNotFoundError:
        raise UserError(f"{path} has no manifest {manifest_path(path).name} beside it.", fix) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{manifest_path(path)} is damaged.", fix) from error
    return manifest


def labels_of(path: Path) -> Tensor:
    """Labels of a .beton file, int64 (N,), -1 where there is none."""
    return torch.from_numpy(np.array(Beton(path).labels, dtype=np.int64))
