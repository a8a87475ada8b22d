"""Weights as files: under our own names, or under those of torchvision's or timm's own model, and tried on it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl import build
from fastssl.errors import UserError
from fastssl.models import backbones, hub, resnet
from fastssl.pretrained.export.use import literal
from fastssl.pretrained.load import METADATA_KEY, Pretrained

TOLERANCE = 1e-4


def plain(backbone: nn.Module) -> nn.Module:
    """A copy in host memory, float32, contiguous, in evaluation mode, that asks for no gradients."""
    twin = copy.deepcopy(backbone).cpu().float().to(memory_format=torch.contiguous_format)
    return twin.eval().requires_grad_(False)


def examples(net: Pretrained, count: int = 2) -> Tensor:
    """Random images (count, C, S, S) as the backbone takes them, the same ones every time."""
    side_px, channels = net.clean.views[0].side_px, len(net.clean.mean_C)
    return torch.randn(count, channels, side_px, side_px, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(ours: nn.Module, theirs_NF: Tensor, images_NCHW: Tensor, *, what: str) -> float:
    """Largest difference between features, relative to the largest of ours.

    Raises:
        UserError: when it is above TOLERANCE, so that nothing wrong is ever handed on.
    """
    ours_NF = ours(images_NCHW)
    worst = float((ours_NF - theirs_NF).abs().max() / ours_NF.abs().max().clamp(min=1e-12))
    if not worst <= TOLERANCE:
        raise UserError(
            f"The features of the {what} export differ from ours by {worst:.2g} of their size.",
            "Nothing was written; export to safetensors instead, and tell us of the network and versions.",
        )
    return worst


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    # cloned: safetensors takes no tensors that share memory, as tied weights do
    return {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}


def save(path: Path, tensors: dict[str, Tensor], record: dict[str, Any], *, suffix: str) -> None:
    """Writes the tensors and reads them back.

    Raises:
        UserError: when the file holds other tensors.
    """
    if suffix == ".pth":
        torch.save(tensors, path)
        written = torch.load(path, weights_only=True)
    else:
        save_file(tensors, path, metadata={"format": "pt", METADATA_KEY: json.dumps(record)})
        written = load_file(path)
    same = written.keys() == tensors.keys() and all(
        torch.allclose(written[name], tensor, rtol=0, atol=0, equal_nan=True) for name, tensor in tensors.items()
    )
    if not same:
        raise UserError(f"{record['file']} does not hold what was written to it.", "Export again, to another disk.")


def write_own(net: Pretrained, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The backbone under its own names; `fastssl.load` reads it back."""
    record = record | {"loading": own_lines(record)}
    save(path, tensors_of(plain(net.backbone)), record, suffix=".safetensors")
    return record


def own_lines(record: dict[str, Any]) -> list[str]:
    return ["import fastssl", f'backbone = fastssl.load({literal(record["file"])}, device="cpu").backbone']


def write_hub(net: Pretrained, path: Path, record: dict[str, Any], *, library: str, suffix: str) -> dict[str, Any]:
    """The backbone under the names of a library's own model, after loading it there."""
    hub_model = hub_model_of(net, library)
    tensors, worst = try_on(hub_model, net)
    record = record | {
        "loading": [*hub_model.code(), *loading_lines(str(record["file"]), suffix)],
        "changes": changes(hub_model),
        "largest_difference": worst,
    }
    save(path, tensors, record, suffix=suffix)
    return record


def try_on(hub_model: hub.HubModel, net: Pretrained) -> tuple[dict[str, Tensor], float]:
    """The backbone's tensors, loaded into a library's own model, and the largest difference of features there.

    Raises:
        UserError: when features differ.
    """
    ours, images, theirs = plain(net.backbone), examples(net), hub_model.build()
    tensors = tensors_of(ours)
    theirs.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        return tensors, compare(ours, theirs.eval()(images), images, what=hub_model.library)


def loading_lines(name: str, suffix: str) -> list[str]:
    if suffix == ".pth":
        return ["import torch", f"model.load_state_dict(torch.load({literal(name)}, weights_only=True), strict=True)"]
    load = f"load_file({literal(name)})"
    return ["from safetensors.torch import load_file", f"model.load_state_dict({load}, strict=True)"]


def changes(hub_model: hub.HubModel) -> str:
    """Why the library's model is not taken as it comes, in one sentence."""
    parts = [path for path, module in hub_model.edits.items() if not isinstance(module, nn.Identity)]
    if parts:
        return (
            f"{hub_model.library}'s {hub_model.name} is changed at {', '.join(parts)}: its published first convolution "
            "does not take these images at this resolution or number of channels."
        )
    return "none but the classifier, which features do without"


def hub_model_of(net: Pretrained, library: str) -> hub.HubModel:
    """The library's model that these weights belong to.

    Raises:
        UserError: when it has none.
    """
    model = net.recipe.model
    family, _, name = model.backbone.rpartition("/")
    only_ours = model.backbone in resnet.RESNETS and (not resnet.in_hubs(model.backbone) or model.width != 1)
    if only_ours or family not in ("", library) or model.backbone == build.model.CUSTOM:
        width = f" of width {model.width:g}" if model.width != 1 else ""
        raise UserError(
            f"{library} has no model that takes the weights of {model.backbone}{width}.",
            "Export to safetensors, torch-export, onnx or huggingface instead.",
        )
    stem = backbones.resolved_stem(model.backbone, model.stem)
    side_px = build.model.sides_px(net.recipe)[0]
    return hub.hub_model(library, name, stem=stem, in_channels=len(net.clean.mean_C), side_px=side_px)
