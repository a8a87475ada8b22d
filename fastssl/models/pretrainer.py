"""Around a backbone: the projector, both together as they are trained, and features in evaluation mode.

A backbone is any module from images (N, C, H, W) to pooled features (N, F). N images (views times batch), C channels,
H W pixels, F features, V views, B images of a batch, D embedding dimensions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.errors import UserError
from fastssl.models import workers
from fastssl.models.matching import Match

EMBED_IMAGES = 64


def projector(features_dim: int, *, widths: Sequence[int], norm: str = "batch", bias: str = "auto") -> nn.Module:
    """Features (N, F) to embeddings (N, D): Linear - norm - ReLU for each hidden width, then Linear.

    Args:
        features_dim: F.
        widths: output width of each linear layer; the last is D. None at all gives the identity.
        norm: "batch", "layer" or "none".
        bias: "all" or "none" of the linear layers, or "auto", all but those before a batch norm, which removes it.
    """
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    layers: list[nn.Module] = []
    inputs = features_dim
    for hidden in widths[:-1]:
        layers.append(nn.Linear(inputs, hidden, bias=bias == "all" or (bias == "auto" and norm != "batch")))
        layers += [norms[norm](hidden)] if norm in norms else []
        layers.append(nn.ReLU(inplace=True))
        inputs = hidden
    layers += [nn.Linear(inputs, width, bias=bias != "none") for width in widths[-1:]]
    return nn.Sequential(*layers) if layers else nn.Identity()


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each part's own mode is restored, since frozen parts stay in evaluation mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def features_dim(
    backbone: nn.Module, *, side_px: int, in_channels: int, setting: str = "augment.side_px", training: bool = False
) -> int:
    """F, found by running images through the backbone, wherever that is; leaves batch statistics alone.

    Args:
        backbone: from images (N, C, H, W) to features (N, F).
        side_px: H and W.
        in_channels: C.
        setting: the recipe's key that decides `side_px`, for the message.
        training: also in training mode, in which some networks give more than features.

    Raises:
        UserError: when the backbone refuses such an image, or gives anything but pooled features (N, F).
    """
    parameter = next(backbone.parameters(), torch.zeros(()))
    image_1CHW = torch.zeros(1, in_channels, side_px, side_px, device=parameter.device)
    fix = f"Choose another model.backbone or {setting} (some networks take one size of image only)."
    try:
        with evaluating(backbone):
            h_1F = backbone(image_1CHW)
            if training:
                check_pooled(in_training(backbone, image_1CHW.expand(2, -1, -1, -1)), 2, fix)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The backbone refuses {in_channels} x {side_px} x {side_px} images: {reason}.", fix) from error
    check_pooled(h_1F, 1, fix)
    return int(h_1F.shape[1])


def in_training(backbone: nn.Module, images_NCHW: Tensor) -> Any:
    """What a backbone gives in training mode, without a trace in its buffers or in torch's random numbers."""
    backbone.train()
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    with torch.random.fork_rng():
        return torch.func.functional_call(backbone, buffers, (images_NCHW,))


@torch.no_grad()
def changing_buffer(module: nn.Module, images_NCHW: Tensor) -> str:
    """Name of a buffer that a call in training mode changes, those of batch norms apart; empty where there is none."""
    of_norms = {id(b) for part in module.modules() if isinstance(part, _BatchNorm) for b in part.buffers(recurse=False)}
    before = {name: buffer for name, buffer in module.named_buffers() if id(buffer) not in of_norms}
    if not before:
        return ""
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with evaluating(module), torch.random.fork_rng():
        module.train()
        torch.func.functional_call(module, after, (images_NCHW,))
    return next((name for name, buffer in before.items() if not torch.equal(buffer, after[name])), "")


def has_unused(module: nn.Module, images_NCHW: Tensor) -> bool:
    """Whether a call in training mode leaves a parameter that is trained without a gradient. Nothing is changed."""
    wanted = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with evaluating(module), torch.random.fork_rng():
        module.train()
        features = torch.func.functional_call(module, wanted | buffers, (images_NCHW,))
    found = torch.autograd.grad(features.float().sum(), list(wanted.values()), allow_unused=True)
    return any(gradient is None for gradient in found)


def check_pooled(h_NF: Any, count: int, fix: str) -> None:
    """UserError unless these are features (N, F) of `count` images, of a dtype that a projector takes."""
    if not isinstance(h_NF, Tensor) or h_NF.ndim != 2 or len(h_NF) != count:
        shape = tuple(h_NF.shape) if isinstance(h_NF, Tensor) else type(h_NF).__name__
        images = "one image" if count == 1 else f"{count} images in training mode"
        raise UserError(f"The backbone gives {shape} for {images}, not pooled features ({count}, F).", fix)
    if not h_NF.is_floating_point() or h_NF.dtype == torch.float64:
        dtype = str(h_NF.dtype).removeprefix("torch.")
        raise UserError(f"The backbone gives features of {dtype}.", "Let it end with .float().")


class Pretrainer(nn.Module):
    """Backbone and projector: groups of views to features h_NF and embeddings z_VBD.

    Views of one group share a side length; a group is (V_g, B, C, H, W). V is the sum over groups, N = V * B.

    Args:
        backbone: images (N, C, H, W) to features (N, F).
        projector: features (N, F) to embeddings (N, D).
        per_view: batch statistics of each view by itself, as in Barlow Twins' own code, or of all views together.
        image_groups: parts of each view's images with statistics of their own; 1 without `per_view`.

    Attributes:
        weights_account: what of a file of weights went into the backbone; None where it begins newly drawn.
    """

    weights_account: Match | None = None

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, *, per_view: bool = False, image_groups: int = 1
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.per_view = per_view
        self.image_groups = image_groups

    def forward(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.per_view:
            return self.embed_together(groups)
        outputs = [self.embed_together([part_1BCHW]) for part_1BCHW in self.units(groups)]
        views = sum(len(views_VBCHW) for views_VBCHW in groups)
        return torch.cat([h_BF for h_BF, _ in outputs]), joined([z_1BD for _, z_1BD in outputs], views=views)

    def units(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """What has batch statistics of its own, (1, B / image_groups, C, H, W) each: view after view."""
        views = [view_1BCHW for group in groups for view_1BCHW in group.split(1)]  # type: ignore[no-untyped-call]
        return [part for view_1BCHW in views for part in view_1BCHW.tensor_split(self.image_groups, dim=1)]

    def embed_together(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """With batch statistics over all these views."""
        h_NF = torch.cat([self.backbone(views_VBCHW.flatten(0, 1)) for views_VBCHW in groups])
        z_ND = self.projector(h_NF)
        views = sum(len(views_VBCHW) for views_VBCHW in groups)
        return h_NF, z_ND.view(views, -1, z_ND.shape[-1])


def joined(embeddings: Sequence[Tensor], *, views: int) -> Tensor:
    """Embeddings (V, B, D) of units that follow each other view after view."""
    z_1ND = torch.cat(list(embeddings), dim=1)
    return z_1ND.view(views, -1, z_1ND.shape[-1])


def embed(backbone: nn.Module, images_BCHW: Tensor, *, autocast: torch.dtype | None) -> Tensor:
    """Pooled features (B, F), float32, in evaluation mode; the module's mode is restored.

    On the CPU threads share the images, 64 at a time: the bits do not depend on the number of threads.

    Args:
        images_BCHW: normalized images on the module's device.
        autocast: dtype of matrix products, or None for float32.
    """
    call = partial(features, autocast=autocast)
    with evaluating(backbone):
        if images_BCHW.device.type != "cpu":
            return call(backbone, images_BCHW)
        return workers.side_by_side(backbone, call, images_BCHW.split(EMBED_IMAGES))  # type: ignore[no-untyped-call]


@torch.inference_mode()
def features(backbone: nn.Module, images_BCHW: Tensor, *, autocast: torch.dtype | None) -> Tensor:
    """What a backbone in evaluation mode gives, (B, F), float32."""
    if autocast is None and images_BCHW.dtype in (torch.bfloat16, torch.float16):
        images_BCHW = images_BCHW.float()  # views of a run in half precision, where that is emulated
    kind, dtype = images_BCHW.device.type, autocast or torch.bfloat16
    # no cache of casts: it is one for all threads, and the first to leave would empty it
    with torch.autocast(kind, dtype=dtype, enabled=autocast is not None, cache_enabled=False):
        h_BF: Tensor = backbone(images_BCHW).float()
    return h_BF
