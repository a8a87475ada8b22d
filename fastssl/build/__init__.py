"""From a recipe to the objects of a run: the only place that chooses which part does what."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl import losses, models
from fastssl.augment.augment import Augment
from fastssl.augment.policy import View
from fastssl.build import optim, ranks
from fastssl.build.data import (  # noqa: F401 - a part of build
    Loader,
    Sets,
    check_batch,
    ensure_data,
    labelled_parts,
    labels_of,
    loader,
    loader_choice,
    manifest_of,
    open_loader,
    ordered_loader,
    sets,
    shuffled_order,
    some_of,
    stream,
)
from fastssl.build.model import CUSTOM as CUSTOM
from fastssl.build.model import check_model as check_model
from fastssl.build.model import compiled as compiled
from fastssl.build.model import network as network
from fastssl.build.model import replays_graphs as replays_graphs
from fastssl.build.model import sides_px as sides_px
from fastssl.errors import UserError
from fastssl.recipe import Recipe, VicReg, ViewSpec, progressive, view_table


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
    return torch.device(name, ranks.local_rank()) if name == "cuda" else torch.device(name)


def autocast(recipe: Recipe) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[recipe.train.precision]


def check(recipe: Recipe) -> None:
    """What can be refused before any data is read or converted: the device, the backbone, a set known to be too small.

    Raises:
        UserError: naming the field.
    """
    device(recipe)
    check_model(recipe)
    if recipe.data.count and not recipe.data.path.exists():
        check_batch(recipe, round((recipe.data.count - recipe.data.val_count) * recipe.data.fraction))


def views(recipe: Recipe) -> tuple[View, ...]:
    return tuple(View(**spec.model_dump()) for spec in view_table(recipe.augment))


def augment(recipe: Recipe, manifest: dict[str, Any], *, where: torch.device) -> Augment:
    """The recipe's view table, normalised by the data's own mean and standard deviation."""
    return make_augment(recipe, views(recipe), manifest, where=where)


def augment_of_epoch(recipe: Recipe, manifest: dict[str, Any], *, where: torch.device) -> Callable[[int], Augment]:
    """Epoch to its view table: `augment`, or smaller views where the recipe is progressive."""
    full = augment(recipe, manifest, where=where)
    if recipe.augment.progressive is None:
        return lambda epoch: full

    def of_epoch(epoch: int) -> Augment:
        rows = progressive.views_of_epoch(recipe.augment, epoch, recipe.train.epochs)
        return replace(full, views=tuple(View(**row.model_dump()) for row in rows))

    return of_epoch


def clean_view(recipe: Recipe, manifest: dict[str, Any], *, where: torch.device) -> Augment:
    """One view that changes nothing but the size, the largest centred square of the image, for evaluation."""
    own = None if recipe.model.backbone.startswith(models.ONE_SIDE_ONLY) else manifest["side_px"]
    side_px = recipe.evaluate.side_px or own or recipe.augment.side_px
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
    return {"all_sum": ranks.all_sum} if ranks.world() > 1 else {}


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


def idle_colour(recipe: Recipe, channels: int) -> str | None:
    """One sentence when jitter or grayscale is asked for and the images do not have three channels, else None."""
    asked = [key for key in ("jitter_p", "gray_p") if any(getattr(row, key) for row in view_table(recipe.augment))]
    if channels == 3 or not asked:
        return None
    off = ", ".join(f"{key}: 0" for key in asked)
    return (
        f"Jitter and grayscale act on 3 channels and the images have {channels}, so they change nothing; "
        f"set augment.all={{{off}}} to say so."
    )


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
