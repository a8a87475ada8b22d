"""From a recipe to its network: which backbone, from which weights it starts, and what of it stays as it is."""

import argparse
import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastssl.build import hardware
from fastssl.errors import UserError
from fastssl.models import backbones, checkpointing, hub, pretrainer, resnet, starting_weights
from fastssl.models.matching import Match
from fastssl.recipe import progressive
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.runs import checkpoint

CUSTOM = "custom"  # model.backbone of a run whose backbone was given as a module


def check_model(recipe: Recipe) -> None:
    """UserError for a backbone that is unknown or not installed, and for starting weights that are not there."""
    model = recipe.model
    if model.backbone == CUSTOM:
        return
    if "/" in model.backbone:
        hub.check_name(model.backbone)
        if model.width != 1:
            raise UserError(
                f"model.width {model.width:g} has no effect on {model.backbone}.", "Leave it out, or set it to 1."
            )
    elif model.backbone not in resnet.RESNETS:
        near = difflib.get_close_matches(model.backbone, resnet.RESNETS, n=1)
        raise UserError(
            f"model.backbone {model.backbone!r} is unknown" + (f", did you mean {near[0]}?" if near else "."),
            f"Set it to one of {', '.join(resnet.RESNETS)}, torchvision/NAME or timm/NAME.",
        )
    if model.weights and model.weights not in hub.LIBRARIES and not Path(model.weights).exists():
        raise UserError(
            f"model.weights {model.weights} does not exist.",
            "Set it to a run folder, a .safetensors, .pth or .ckpt file, torchvision or timm.",
        )


def drawn(recipe: Recipe) -> Recipe:
    """The recipe for a network whose weights are drawn, whatever it would start from."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})


def network(
    recipe: Recipe, *, in_channels: int, device: torch.device, backbone: torch.nn.Module | None = None
) -> pretrainer.Pretrainer:
    """Backbone and projector: drawn from the recipe's seed, or started and frozen as the recipe says.

    Args:
        recipe: names the backbone and where it starts from.
        in_channels: C of the images.
        device: device.
        backbone: a module to use instead, from images (N, C, H, W) to features (N, F); its weights are kept.

    Raises:
        UserError: when the parts do not fit each other or the images.
    """
    with hardware.seeded(recipe.seed, device):
        return network_of_seed(recipe, in_channels=in_channels, device=device, backbone=backbone)


def network_of_seed(
    recipe: Recipe, *, in_channels: int, device: torch.device, backbone: torch.nn.Module | None
) -> pretrainer.Pretrainer:
    """As `network`, drawn from torch's global random numbers as they are."""
    model, sides, account = recipe.model, sides_px(recipe), None
    if backbone is None and model.backbone == CUSTOM:
        raise UserError(
            "The recipe was run with a backbone of its own, which it cannot name.", "Pass the module as backbone=."
        )
    if backbone is None:
        images = f"{in_channels} x {sides[0]} x {sides[0]} images"
        fix = "Choose another model.backbone or augment.side_px (some networks take one size of image only)."
        with explained(f"model.backbone {model.backbone} cannot be built for {images}", fix):
            backbone = backbones.backbone(
                model.backbone, stem=model.stem, width=model.width, in_channels=in_channels, side_px=sides[0]
            )
        account = load_weights(recipe, backbone)
    starting_weights.freeze(backbone, model.freeze)
    if recipe.train.gradient_checkpointing:
        checkpointing.checkpoint_blocks(backbone)
    dims = [
        pretrainer.features_dim(backbone, side_px=side_px, in_channels=in_channels, training=True) for side_px in sides
    ]
    both = pretrainer.Pretrainer(
        backbone,
        projector(recipe, dims[0]),
        per_view=model.batch_norm == "per_view",
        image_groups=model.batch_norm_groups,
    )
    both.weights_account = account
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    return both.to(device).to(memory_format=layout)


def projector(recipe: Recipe, features_dim: int) -> torch.nn.Module:
    """The recipe's projector for features of F = features_dim, newly drawn."""
    model = recipe.model
    with explained(f"model.projector {[*model.projector]} cannot be built", "Give model.projector smaller widths."):
        return pretrainer.projector(
            features_dim, widths=model.projector, norm=model.projector_norm, bias=model.projector_bias
        )


@contextlib.contextmanager
def explained(what: str, fix: str) -> Iterator[None]:
    """UserError in place of what a library raises while it builds its part of a network."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # timm's and torchvision's constructors may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what}: {reason.rstrip('.!')}.", fix) from error


def few_images(recipe: Recipe, wanted: int) -> int:
    """A batch for a trial: about as many images as wanted, at most the recipe's batch.

    Each group of images with batch statistics of its own has at least 2 of them in each part of a step.
    """
    parts, least = recipe.optim.accumulate_steps, 2 * recipe.model.batch_norm_groups
    return min(recipe.data.batch_size, parts * max(-(-wanted // parts), least))


def compiled(recipe: Recipe, module: torch.nn.Module, *, fullgraph: bool = False) -> torch.nn.Module:
    """The module as the recipe wants it called: itself, or compiled for every shape apart.

    Args:
        recipe: says whether and how.
        module: from the network of this recipe.
        fullgraph: fail where one graph cannot hold all of it, if the backbone is one of this package.
    """
    mode = recipe.train.compile
    if not mode:
        return module
    allow_compilations(2 * len(sides_px(recipe)))
    optimized: torch.nn.Module = torch.compile(  # type: ignore[assignment]
        module,
        dynamic=False,
        fullgraph=fullgraph and recipe.model.backbone in resnet.RESNETS,
        mode=None if mode is True else mode,
    )
    return optimized


def allow_compilations(count: int) -> None:
    """Has torch.compile take so many more versions of one function, and fail where that is not enough.

    torch counts all networks of a class together, and after 8 it runs the next one eagerly without a word.
    """
    config = torch._dynamo.config
    config.recompile_limit += count
    config.accumulated_recompile_limit += count
    config.fail_on_recompile_limit_hit = True


def replays_graphs(recipe: Recipe) -> bool:
    """Whether the compiled network's outputs lie in memory that its next call on CUDA overwrites."""
    return isinstance(recipe.train.compile, str)


def sides_px(recipe: Recipe) -> list[int]:
    """Sides of the images that the recipe shows the network, the largest view's first."""
    sides = {row.side_px for row in view_table(recipe.augment)} | {
        *progressive.sides_px(recipe.augment, recipe.train.epochs)
    }
    return sorted(sides, reverse=True) + ([recipe.evaluate.side_px] if recipe.evaluate.side_px else [])


def load_weights(recipe: Recipe, backbone: torch.nn.Module) -> Match | None:
    """Loads the recipe's weights, if it names any, into a backbone; returns what was taken."""
    source = recipe.model.weights
    if source is None:
        return None
    if source in hub.LIBRARIES:
        library, _, name = recipe.model.backbone.rpartition("/")
        if library not in ("", source):
            raise UserError(
                f"model.weights is {source}, but the backbone is {recipe.model.backbone}.",
                f"Set model.weights to {library}, or to a file.",
            )
        tensors: Mapping[str, Any] = starting_weights.download(source, name)
    else:
        tensors = weights_of(Path(source))
    return starting_weights.load_pretrained(backbone, tensors, origin=source)


def weights_of(path: Path) -> Mapping[str, Any]:
    """Tensors of a run, a checkpoint, a .safetensors file, or what torch.save wrote (.pth, .pt, .bin, .tar, .ckpt).

    Of the latter, tensors and plain values alone are read (`weights_only`); argparse's Namespace, in which many scripts
    keep their options, counts as plain.

    Raises:
        UserError: when there are none, they are damaged, or the file would have to be unpickled.
    """
    if path.suffix not in (".pth", ".pt", ".bin", ".tar", ".ckpt"):
        return checkpoint.load_weights(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise TypeError(f"it holds a {type(loaded).__name__}")
    except Exception as error:
        name = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"it holds a {name[1]}" if name else type(error).__name__
        raise UserError(
            f"{path} holds no plain state_dict, and nothing else is unpickled ({reason}).",
            "Save model.state_dict() with torch.save, or as .safetensors.",
        ) from error
    return loaded
