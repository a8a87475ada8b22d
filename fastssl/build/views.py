"""The recipe's view table as an augmentation of batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from fastssl.augment.augment import Augment
from fastssl.augment.backend import BackendName, backend_of
from fastssl.augment.policy import View
from fastssl.build.hardware import autocast
from fastssl.data.batch import Batch
from fastssl.data.manifest import Manifest
from fastssl.errors import UserError
from fastssl.models.hub import ONE_SIDE_ONLY
from fastssl.recipe import progressive
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import MAX_VIEW_PX, Recipe, ViewSpec


def table(recipe: Recipe) -> tuple[View, ...]:
    return tuple(View(**spec.model_dump()) for spec in view_table(recipe.augment))


def augment(recipe: Recipe, manifest: Manifest, *, device: torch.device) -> Augment:
    """The recipe's view table, normalized by the data's own mean and standard deviation, or the recipe's."""
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
    side_px = recipe.evaluate.side_px or own or progressive.full_side_px(recipe.augment)
    return make_augment(
        recipe, (View(**ViewSpec(side_px=side_px, crop="center").model_dump()),), manifest, device=device
    )


def make_augment(recipe: Recipe, rows: tuple[View, ...], manifest: Manifest, *, device: torch.device) -> Augment:
    """Those rows by the recipe's backend, which may be for another device than that on which a run is looked at.

    There the device's own makes equal views; where `auto` is cuda and does not run here, torch's.
    """
    mean_C, std_C = normalization(recipe, manifest)
    plain = Augment(
        views=rows,
        mean_C=mean_C,
        std_C=std_C,
        seed=recipe.seed,
        dtype=autocast(recipe) or torch.float32,
        backend=backend_of("torch"),
    )
    name = backend_name(recipe, device)
    if not fits(name, device):
        name = own_backend(device)
    if recipe.augment.backend == "auto" and name == "cuda" and cuda_failure(plain, device):
        return plain
    return replace(plain, backend=backend_of(name))


def normalization(recipe: Recipe, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, in [0, 1].

    Raises:
        UserError: when the recipe has them for another number of channels.
    """
    given = {"mean": recipe.augment.mean, "std": recipe.augment.std}
    for name, values_C in given.items():
        if values_C is not None and len(values_C) != manifest.channels:
            raise UserError(
                f"augment.{name} has {len(values_C)} values, but the images have {manifest.channels} channels.",
                f"Give augment.{name} {manifest.channels}, or leave it out.",
            )
    return given["mean"] or manifest.mean, given["std"] or tuple(max(s, 1e-3) for s in manifest.std)


def backend_name(recipe: Recipe, device: torch.device) -> BackendName:
    """The recipe's backend, for `auto` the device's own."""
    match recipe.augment.backend:
        case "auto":
            return own_backend(device)
        case name:
            return name


def own_backend(device: torch.device) -> BackendName:
    return "cpu" if device.type == "cpu" else "cuda" if device.type == "cuda" else "torch"


def fits(name: BackendName, device: torch.device) -> bool:
    """Whether a backend makes views on such a device."""
    return name in ("torch", device.type)


def check_backend(recipe: Recipe, device: torch.device) -> None:
    """Refuses a backend for another device, and one that is not installed.

    Raises:
        UserError: naming the field.
    """
    name = recipe.augment.backend
    if name == "auto":
        return
    if not fits(name, device):
        raise UserError(
            f"augment.backend is {name}, but the device is {device.type}.",
            f"Set augment.backend to auto or torch, or device to {name}.",
        )
    try:
        backend_of(name)
    except ImportError as error:
        raise UserError(
            f"augment.backend is {name}, but {error.name} is not installed.",
            f"Run `pip install {error.name}`, or set augment.backend to auto.",
        ) from error


def reads_in_place(recipe: Recipe, device: torch.device) -> bool:
    """Whether the recipe's backend takes images where they lie in the resident set."""
    try:
        return backend_of(backend_name(recipe, device)).reads_in_place
    except ImportError:  # no Triton: the torch backend takes its place
        return False


@lru_cache(maxsize=64)
def cuda_failure(augment: Augment, device: torch.device) -> str | None:
    """Why the CUDA backend cannot cut these views on this device, found by cutting one image's; None when it can."""
    try:
        index_B = torch.zeros(1, dtype=torch.int64, device=device)
        images = torch.zeros((1, 32, 32, len(augment.mean_C)), dtype=torch.uint8, device=device)
        replace(augment, backend=backend_of("cuda"))(Batch(images, index_B, index_B), 0)
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def fallback(recipe: Recipe, augment: Augment, *, device: torch.device, setting: str = "augment.backend") -> str | None:
    """Two lines when `auto` had to leave the CUDA backend for torch, else None."""
    if recipe.augment.backend != "auto" or device.type != "cuda" or augment.backend.name != "torch":
        return None
    return (
        f"The CUDA backend of the augmentation does not run here ({cuda_failure(augment, device)}).\n"
        f"The torch backend makes the views, more slowly; install another Triton, or set {setting} to torch."
    )


def idle_color(recipe: Recipe, channels: int, *, fix: bool = True) -> str | None:
    """One sentence when jitter or grayscale is asked for and the images do not have three channels, else None.

    Args:
        recipe: asks for the views.
        channels: of the images.
        fix: say what to set in the recipe.
    """
    asked = [key for key in ("jitter_p", "gray_p") if any(getattr(row, key) for row in view_table(recipe.augment))]
    if channels == 3 or not asked:
        return None
    off = ", ".join(f"{key}: 0" for key in asked)
    said = f"Jitter and grayscale act on 3 channels and the images have {channels}, so they change nothing"
    return f"{said}; set augment.all={{{off}}} to say so." if fix else f"{said}."
