"""Where a backbone starts from: weights of a file, of a library or of an earlier run, and which parts stay as they are.

C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.errors import UserError
from fastssl.models.hub import create, require_timm
from fastssl.models.matching import Match, match

# Where networks keep their stages: our ResNets and torchvision's, then timm's and torchvision's other families.
STAGE_LISTS = ("stages", "blocks", "layers", "features", "encoder.layers")


def download(library: str, name: str) -> dict[str, Tensor]:
    """A library's own pretrained weights of a model, from its cache or the network.

    Args:
        library: "torchvision" or "timm".
        name: of the model there.

    Raises:
        UserError: when they are neither here nor to be had.
    """
    try:
        if library == "timm":
            require_timm()
            return create("timm", name, {"pretrained": True}).state_dict()
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False)
        return tensors
    except UserError:
        raise
    except Exception as error:  # each library has its own errors for a network that is away
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(
            f"The weights of {library}/{name} are not here and could not be downloaded: {reason}.",
            "Connect to the network once, or set model.weights to a file of weights.",
        ) from error


def load_pretrained(backbone: nn.Module, loaded: Mapping[str, Any], *, origin: str) -> Match:
    """Loads weights into a backbone, every one of its tensors, and returns what of the file was and was not taken.

    A first convolution of another number of channels is adapted: its channels are shared out or summed up, so
    that equal channels give what they gave before.

    Args:
        backbone: to be filled.
        loaded: tensors by name, with any prefix and in any mapping, as `match` finds them.
        origin: what a person calls the weights.

    Raises:
        UserError: naming what does not fit.
    """
    own = backbone.state_dict()
    chosen, account = match(backbone, loaded, origin=origin)
    first = next((key for key, value in own.items() if value.ndim == 4), None)
    if first is not None:
        chosen[first] = with_channels(chosen[first], own[first].shape[1])
    wrong = [key for key in own if key in chosen and chosen[key].shape != own[key].shape]
    if wrong:
        shapes = f"{tuple(chosen[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        raise UserError(
            f"{origin} does not fit the backbone: its {wrong[0]} is {shapes}.",
            "Set model.backbone, stem and width to those of the weights (published ones have the stem imagenet).",
        )
    backbone.load_state_dict(chosen, strict=False)  # what may be absent was named by `match`
    return account


def with_channels(kernel_OCHW: Tensor, channels: int) -> Tensor:
    """A first kernel for another number of input channels, with the same answer where all channels are equal."""
    if kernel_OCHW.ndim != 4 or kernel_OCHW.shape[1] == channels:
        return kernel_OCHW
    have = kernel_OCHW.shape[1]
    if have > channels:
        fewer = kernel_OCHW.new_zeros(len(kernel_OCHW), channels, *kernel_OCHW.shape[2:])
        return fewer.index_add_(1, torch.arange(have) % channels, kernel_OCHW)
    source_C = torch.arange(channels) % have
    return kernel_OCHW[:, source_C] / torch.bincount(source_C)[source_C][:, None, None]


def freeze(backbone: nn.Module, what: int | Sequence[str]) -> int:
    """Keeps parameters as they are, and the batch statistics of the layers they belong to; returns how many numbers.

    Args:
        backbone: any; a number of stages needs one that keeps them in a list.
        what: so many stages, with all that comes before and between them, or beginnings of parameter names.

    Raises:
        UserError: when there are fewer stages, or no parameter has such a name.
    """
    names = [name for name, _ in backbone.named_parameters()]
    prefixes = [what] if isinstance(what, str) else what
    chosen = first_stages(backbone, names, what) if isinstance(what, int) else []
    for prefix in () if isinstance(prefixes, int) else prefixes:
        matching = [name for name in names if name.startswith(prefix)]
        if not matching:
            raise UserError(
                f"model.freeze names {prefix!r}, but no parameter of the backbone begins so.",
                f"Its parameters begin with {', '.join(sorted({name.partition('.')[0] for name in names}))}.",
            )
        chosen += matching
    count = 0
    for name in set(chosen):
        parameter = backbone.get_parameter(name).requires_grad_(False)
        count += parameter.numel()
    for module in backbone.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
    return count


def first_stages(backbone: nn.Module, names: list[str], count: int) -> list[str]:
    """Names of all parameters up to the end of stage `count`, in the order of registration."""
    if count == 0:
        return []
    stages = stage_names(backbone)
    if count > len(stages):
        raise UserError(
            f"model.freeze is {count}, but the backbone has {len(stages)} stages.",
            f"Set model.freeze to {len(stages)} or less, or to beginnings of parameter names.",
        )
    last = max(i for i, name in enumerate(names) if name.startswith(stages[count - 1] + "."))
    return names[: last + 1]


def stage_names(backbone: nn.Module) -> list[str]:
    """Paths of a backbone's stages, first to last; empty when it keeps none that we know of."""
    numbered = [name for name, _ in backbone.named_children() if name.startswith("layer") and name[5:].isdigit()]
    if numbered:
        return numbered
    parts = dict(backbone.named_modules())
    prefix = next((path for path in STAGE_LISTS if path in parts), None)
    paths = [f"{prefix}.{name}" for name, _ in parts[prefix].named_children()] if prefix else []
    return [path for path in paths if any(True for _ in parts[path].parameters())]
