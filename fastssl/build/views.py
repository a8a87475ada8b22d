"""The recipe's view table as an augmentation of batches."""

from collections.abc import Callable
from dataclasses import replace

import torch

from fastssl.augment.augment import Augment
from fastssl.augment.backend import BackendName, backend_of
from fastssl.augment.policy import View
from fastssl.build.hardware import autocast
from fastssl.data.manifest import Manifest
from fastssl.models.hub import ONE_SIDE_ONLY
from fastssl.recipe import progressive
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import MAX_VIEW_PX, Recipe, ViewSpec


def table(recipe: Recipe) -> tuple[View, ...]:
    return tuple(View(**spec.model_dump()) for spec in view_table(recipe.augment))


def augment(recipe: Recipe, manifest: Manifest, *, device: torch.device) -> Augment:
    """The recipe's view table, normalized by the data's own mean and standard deviation."""
    return make_augment(recipe, table(recipe), manifest, device=device)


def augment_of_epoch(recipe: Recipe, manifest: Manifest, *, device: torch.device) -> Callable[[int], Augment]:
    """Epoch to its view table: `augment`, or smaller views where the recipe is progressive."""
    full = augment(recipe, manifest, device=device)
    if recipe.augment.progressive is None:
        return lambda epoch: full

    def of_epoch(epoch: int) -> Augment:
        rows = progressive.views_of_epoch(recipe.augment, epoch, recipe.train.epochs)
        return replace(full, views=tuple(View(**row.model_dump()) for row in rows))

    return of_epoch


def clean_view(recipe: Recipe, manifest: Manifest, *, device: torch.device) -> Augment:
    """One view that changes nothing but the size, the largest centered square of the image, for evaluation."""
    own = None if recipe.model.backbone.startswith(ONE_SIDE_ONLY) else manifest.side_px
    if own is not None and own > MAX_VIEW_PX:  # no backbone takes them whole
        own = None
    side_px = recipe.evaluate.side_px or own or recipe.augment.side_px
    return make_augment(
        recipe, (View(**ViewSpec(side_px=side_px, crop="center").model_dump()),), manifest, device=device
    )


def make_augment(recipe: Recipe, rows: tuple[View, ...], manifest: Manifest, *, device: torch.device) -> Augment:
    backend: BackendName
    if recipe.augment.backend == "auto":
        backend = "cpu" if device.type == "cpu" else "cuda" if device.type == "cuda" else "torch"
    else:
        backend = recipe.augment.backend
    return Augment(
        views=rows,
        mean_C=manifest.mean,
        std_C=tuple(max(s, 1e-3) for s in manifest.std),
        seed=recipe.seed,
        dtype=autocast(recipe) or torch.float32,
        backend=backend_of(backend),
    )


def idle_color(recipe: Recipe, channels: int) -> str | None:
    """One sentence when jitter or grayscale is asked for and the images do not have three channels, else None."""
    asked = [key for key in ("jitter_p", "gray_p") if any(getattr(row, key) for row in view_table(recipe.augment))]
    if channels == 3 or not asked:
        return None
    off = ", ".join(f"{key}: 0" for key in asked)
    return (
        f"Jitter and grayscale act on 3 channels and the images have {channels}, so they change nothing; "
        f"set augment.all={{{off}}} to say so."
    )
