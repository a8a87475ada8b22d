"""Backbones, by name or from torchvision and timm; projectors; where they start from and what stays frozen."""

from torch import nn

from fastssl.models.hub import LIBRARIES as LIBRARIES
from fastssl.models.hub import ONE_SIDE_ONLY as ONE_SIDE_ONLY
from fastssl.models.hub import Stock as Stock
from fastssl.models.hub import check_name as check_name
from fastssl.models.hub import published as published
from fastssl.models.hub import stock as stock
from fastssl.models.pretrainer import Pretrainer as Pretrainer
from fastssl.models.pretrainer import embed as embed
from fastssl.models.pretrainer import evaluating as evaluating
from fastssl.models.pretrainer import features_dim as features_dim
from fastssl.models.pretrainer import parameter_count as parameter_count
from fastssl.models.pretrainer import projector as projector
from fastssl.models.resnet import RESNETS as RESNETS
from fastssl.models.resnet import ResNet as ResNet
from fastssl.models.resnet import is_published as is_published
from fastssl.models.resnet import resnet as resnet
from fastssl.models.starting_weights import download as download
from fastssl.models.starting_weights import fit as fit
from fastssl.models.starting_weights import freeze as freeze


def backbone(name: str, *, stem: str, width: float = 1.0, in_channels: int = 3, side_px: int = 224) -> nn.Module:
    """A backbone by name, its parameters newly drawn.

    Args:
        name: a key of RESNETS, "torchvision/NAME" or "timm/NAME".
        stem: "auto" is "cifar" for a key of RESNETS and "imagenet", as published, for others; see `ResNet`, `stock`.
        width: factor on the channels of a key of RESNETS.
        in_channels: C of the images.
        side_px: of the images; matters to published networks with position embeddings.
    """
    if name in RESNETS:
        return resnet(name, stem=resolved_stem(name, stem), width=width, in_channels=in_channels)
    return published(name, stem=resolved_stem(name, stem), in_channels=in_channels, side_px=side_px)


def resolved_stem(name: str, stem: str) -> str:
    """What "auto" stands for."""
    return stem if stem != "auto" else "cifar" if name in RESNETS else "imagenet"
