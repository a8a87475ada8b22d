"""Backbones that torchvision and timm publish, by name, and the edits that fit them to small images or other channels.

One list of edits serves both ways: it is applied when a backbone is built, and printed as code when one is exported, so
the lines a person is given are those that were run.
"""

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastssl.errors import UserError
from fastssl.models.resnet import patch_px

LIBRARIES = ("torchvision", "timm")
WITH_AUXILIARY = ("googlenet", "inception_v3")  # while training they give a tuple, unless asked not to
# Networks whose parameters belong to one side length; others take any.
ONE_SIDE_ONLY = ("torchvision/vit", "timm/swin", "timm/mixer", "timm/gmlp", "timm/resmlp", "timm/cait", "timm/tnt")


@dataclass(frozen=True)
class HubModel:
    """A library's own model, and what is changed in it to make a backbone.

    Attributes:
        library: "torchvision" or "timm".
        name: of the model there.
        arguments: of torchvision.models.get_model or timm.create_model.
        edits: submodules that replace others, by their path.
    """

    library: str
    name: str
    arguments: dict[str, Any]
    edits: dict[str, nn.Module]

    def build(self) -> nn.Module:
        """The changed model, its parameters newly drawn."""
        return edited(create(self.library, self.name, self.arguments), self.edits)

    def code(self) -> list[str]:
        """The lines of Python that `build` stands for, ending with `model`."""
        words = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        maker = {"torchvision": "torchvision.models.get_model", "timm": "timm.create_model"}[self.library]
        lines = [f"import {self.library}"]
        lines += ["from torch import nn"] if self.edits else []
        lines += [f'model = {maker}("{self.name}"{words})']
        return lines + [f'model.set_submodule("{path}", nn.{module!r})' for path, module in self.edits.items()]


def hub_backbone(name: str, *, stem: str, in_channels: int, side_px: int) -> nn.Module:
    """The backbone "torchvision/NAME" or "timm/NAME", its parameters newly drawn; see `hub_model`."""
    library, _, model = name.partition("/")
    return hub_model(library, model, stem=stem, in_channels=in_channels, side_px=side_px).build()


def hub_model(library: str, name: str, *, stem: str, in_channels: int, side_px: int) -> HubModel:
    """How a library's model becomes a backbone.

    Args:
        library: "torchvision" or "timm".
        name: of the model there.
        stem: "imagenet" leaves the first convolution as published; "cifar" makes it 3x3 stride 1 and drops the pool
            after it; "patchN" makes it NxN stride N without a pool.
        in_channels: C of the images.
        side_px: of the images; matters to networks with position embeddings.

    Raises:
        UserError: when the library is absent or has no such model, or the stem does not fit it.
    """
    check_name(f"{library}/{name}")
    edits: dict[str, nn.Module] = {}
    with torch.device("meta"):  # only the structure is looked at
        if library == "timm":
            arguments, model = timm_arguments(name, in_channels=in_channels, side_px=side_px, patch=patch_px(stem))
        else:
            arguments = {"image_size": side_px} if name.startswith("vit_") else {}
            if name in WITH_AUXILIARY:
                arguments = {"aux_logits": False, "init_weights": False}
            model = create(library, name, arguments)
            edits = head_edits(model, name)
    if arguments.get("image_size") and patch_px(stem):
        raise UserError(
            f"model.stem {stem} does not fit torchvision/{name}, whose patches are fixed.",
            "Set model.stem to imagenet, or take one of timm's vit_*.",
        )
    if "patch_size" not in arguments:
        edits |= stem_edits(model, f"{library}/{name}", stem=stem, in_channels=in_channels)
    return HubModel(library, name, arguments, edits)


def check_name(name: str) -> None:
    """UserError unless `name` is "LIBRARY/MODEL", the library is installed and has that model."""
    library, _, model = name.partition("/")
    if library not in LIBRARIES:
        raise UserError(f"model.backbone {name!r} is unknown.", "Write torchvision/NAME or timm/NAME.")
    names = listed(library)
    if model.partition(".")[0] not in names:
        near = difflib.get_close_matches(model, names, n=1)
        hint = f"Did you mean {library}/{near[0]}?" if near else f"See {library}'s list of models."
        raise UserError(f"model.backbone {name!r} is unknown: {library} has no such model.", hint)


def listed(library: str) -> list[str]:
    """Names of the classification models that a library can build."""
    if library == "torchvision":
        import torchvision

        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names
    require_timm()
    import timm

    models: list[str] = timm.list_models()
    return models


def require_timm() -> None:
    if importlib.util.find_spec("timm") is None:
        raise UserError("timm is not installed.", "Install it with `pip install 'fastssl-vision[timm]'`.")


def create(library: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module
    if library == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, **arguments)
    else:
        require_timm()
        import timm

        model = timm.create_model(name, **arguments)
    return model


def timm_arguments(name: str, *, in_channels: int, side_px: int, patch: int | None) -> tuple[dict[str, Any], nn.Module]:
    """The most telling arguments that the model takes: constructors refuse what they do not know."""
    base = {"num_classes": 0, "in_chans": in_channels}
    sized: tuple[dict[str, Any], ...] = ({"img_size": side_px, "dynamic_img_size": True}, {"img_size": side_px}, {})
    patched: tuple[dict[str, Any], ...] = ({"patch_size": patch}, {}) if patch else ({},)
    for more in ({**a, **b} for b in patched for a in sized):
        try:
            return base | more, create("timm", name, base | more)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
    raise UserError(f"timm/{name} cannot be built without a classifier.", "Choose another model.backbone.")


def head_edits(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The classifier, which is the last linear layer, and the dropout before it, as identities."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"torchvision/{name} ends in no linear layer.", "Choose another model.backbone.")
    parent, _, _ = linear[-1].rpartition(".")
    siblings = model.get_submodule(parent).named_children()
    dropouts = [f"{parent}.{child}".lstrip(".") for child, module in siblings if isinstance(module, nn.Dropout)]
    return {path: nn.Identity() for path in (*dropouts, linear[-1])}


def stem_edits(model: nn.Module, name: str, *, stem: str, in_channels: int) -> dict[str, nn.Module]:
    """The first convolution for this stem and number of channels, and no pool after a small stem."""
    convolution = next(((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise UserError(f"{name} begins with no convolution.", "Choose another model.backbone.")
    path, first = convolution
    bias, outputs, side = first.bias is not None, first.out_channels, patch_px(stem)
    if stem == "cifar" and first.kernel_size == first.stride:
        raise UserError(
            f"model.stem cifar does not fit {name}, which begins with patches of {first.stride[0]} px.",
            "Set model.stem to imagenet (as published) or to patch2, patch4 or patch8.",
        )
    if stem == "cifar":
        edits: dict[str, nn.Module] = {path: nn.Conv2d(in_channels, outputs, 3, padding=1, bias=bias)}
    elif side:
        edits = {path: nn.Conv2d(in_channels, outputs, side, stride=side, bias=bias)}
    elif first.in_channels != in_channels:
        shape = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
        return {path: nn.Conv2d(in_channels, outputs, bias=bias, **shape)}  # type: ignore[arg-type]
    else:
        return {}
    pools = [path for path, module in model.named_modules() if isinstance(module, nn.MaxPool2d)]
    return edits | {pool: nn.Identity() for pool in pools[:1]}


def edited(model: nn.Module, edits: dict[str, nn.Module]) -> nn.Module:
    """The same model with copies of the edits in place, their weights drawn as He et al. (2015) draw them."""
    for path, module in edits.items():
        fresh: nn.Module = nn.Identity()
        if isinstance(module, nn.Conv2d):
            settings = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding")}
            fresh = nn.Conv2d(module.in_channels, module.out_channels, bias=module.bias is not None, **settings)
            nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(path, fresh)
    return model
