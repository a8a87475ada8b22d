"""From a recipe to its network: which backbone, from which weights it starts, and what of it stays as it is."""

import difflib
from pathlib import Path

import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.models import backbones, checkpointing, hub, pretrainer, resnet, starting_weights
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
            "Set it to a run folder, a .safetensors or .pth file, torchvision or timm.",
        )


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
    torch.manual_seed(recipe.seed)
    model, sides = recipe.model, sides_px(recipe)
    if backbone is None and model.backbone == CUSTOM:
        raise UserError(
            "The recipe was run with a backbone of its own, which it cannot name.", "Pass the module as backbone=."
        )
    if backbone is None:
        backbone = backbones.backbone(
            model.backbone, stem=model.stem, width=model.width, in_channels=in_channels, side_px=sides[0]
        )
        start(recipe, backbone)
    starting_weights.freeze(backbone, model.freeze)
    if recipe.train.gradient_checkpointing:
        checkpointing.checkpoint_blocks(backbone)
    dims = [pretrainer.features_dim(backbone, side_px=side_px, in_channels=in_channels) for side_px in sides]
    projector = pretrainer.projector(
        dims[0], widths=model.projector, norm=model.projector_norm, bias=model.projector_bias
    )
    both = pretrainer.Pretrainer(backbone, projector)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    return both.to(device).to(memory_format=layout)


def compiled(recipe: Recipe, module: torch.nn.Module) -> torch.nn.Module:
    """The module as the recipe wants it called: itself, or compiled for every shape apart."""
    mode = recipe.train.compile
    if not mode:
        return module
    allow_compilations(2 * len(sides_px(recipe)))
    made: torch.nn.Module = torch.compile(module, dynamic=False, mode=None if mode is True else mode)  # type: ignore[assignment]
    return made


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


def start(recipe: Recipe, backbone: torch.nn.Module) -> None:
    """Puts the recipe's starting weights, if it names any, into a backbone."""
    source = recipe.model.weights
    if source is None:
        return
    if source in hub.LIBRARIES:
        library, _, name = recipe.model.backbone.rpartition("/")
        if library not in ("", source):
            raise UserError(
                f"model.weights is {source}, but the backbone is {recipe.model.backbone}.",
                f"Set model.weights to {library}, or to a file.",
            )
        tensors = starting_weights.download(source, name)
    else:
        tensors = weights_of(Path(source))
    starting_weights.fit(backbone, tensors, origin=source)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Tensors of a run, a checkpoint, a .safetensors file, or a .pth file of tensors alone.

    Raises:
        UserError: when there are none, they are damaged, or a .pth file holds anything but tensors.
    """
    if path.suffix not in (".pth", ".pt", ".bin"):
        return checkpoint.load_weights(path)
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("not a mapping from names to tensors")
    except Exception as error:
        raise UserError(
            f"{path} holds no plain state_dict ({type(error).__name__}).",
            "Save model.state_dict() with torch.save, or as .safetensors.",
        ) from error
    return tensors
