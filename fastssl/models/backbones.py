"""Backbones by name: the package's own ResNets, or torchvision's and timm's networks."""

from torch import nn

from fastssl.models.hub import hub_backbone
from fastssl.models.resnet import RESNETS, resnet


def backbone(name: str, *, stem: str, width: float = 1.0, in_channels: int = 3, side_px: int = 224) -> nn.Module:
    """A backbone by name, its parameters newly drawn.

    Args:
        name: a key of RESNETS, "torchvision/NAME" or "timm/NAME".
        stem: "auto" is "cifar" for a key of RESNETS and "imagenet", as published, for others; see `hub_model`.
        width: factor on the channels of a key of RESNETS.
        in_channels: C of the images.
        side_px: of the images; matters to published networks with position embeddings.
    """
    if name in RESNETS:
        return resnet(name, stem=resolved_stem(name, stem), width=width, in_channels=in_channels)
    return hub_backbone(name, stem=resolved_stem(name, stem), in_channels=in_channels, side_px=side_px)


def resolved_stem(name: str, stem: str) -> str:
    """What "auto" stands for."""
    return stem if stem != "auto" else "cifar" if name in RESNETS else "imagenet"
