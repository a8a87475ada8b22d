"""ResNets. Without pooling, parameter names are torchvision's, so weights load there unchanged.

The network is torchvision's with choices it does not offer: a small-image stem, a width factor, any number of stages,
pooling between them, which numbers a stage's blocks from 1, overlapping patches and features of all stages. N images
(views times batch), C channels, H W pixels, P = H W, F features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

EPSILON = 1e-5  # of variances, as batch norm's


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits on the 3x3 (torchvision's ResNet-50 v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A ResNet without its classifier: images (N, C, H, W) to pooled features (N, F).

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each stage.
        widths: channels of each stage before the block's expansion; the stem has the first of them.
        stem: "imagenet" (7x7 stride 2, then max-pool), "cifar" (3x3 stride 1, no pool) or "patchN" (NxN stride N).
        in_channels: C.
        pooled: halve the resolution between stages by averaging 2x2 pixels, in place of strided convolutions.
        overlapping: patches of the stem reach N/2 pixels into their neighbors.
        moments: features are the mean and the standard deviation over the pixels of every stage's maps, then batch
            norm, which gives all of them the same weight in a distance.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: str,
        in_channels: int,
        pooled: bool = False,
        overlapping: bool = False,
        moments: bool = False,
    ) -> None:
        super().__init__()
        side = patch_px(stem) or 0
        kernel, stride, padding = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1)}.get(stem, (side, side, 0))
        if side and overlapping:
            kernel, padding = side + 2 * (side // 2), side // 2
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        inputs, self.moments = widths[0], moments
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth, width) in enumerate(zip(self.stages, depths, widths, strict=True)):
            parts: list[nn.Module] = []
            if pooled and i > 0:
                parts.append(nn.AvgPool2d(2, ceil_mode=True))  # one pixel stays one pixel
            for j in range(depth):
                parts.append(block(inputs, width, stride=2 if i > 0 and j == 0 and not pooled else 1))
                inputs = width * block.expansion
            self.add_module(name, nn.Sequential(*parts))
        self.features_dim = 2 * sum(widths) * block.expansion if moments else inputs
        if moments:
            self.norm = nn.BatchNorm1d(self.features_dim)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        of_stages = []
        for name in self.stages:
            x = getattr(self, name)(x)
            if self.moments:
                of_stages.append(moments_of(x))
        features_NF: Tensor = self.norm(torch.cat(of_stages, dim=1)) if self.moments else x.mean(dim=(2, 3))
        return features_NF


def moments_of(maps_NCHW: Tensor) -> Tensor:
    """Mean and standard deviation over pixels, (N, 2 C), float32."""
    pixels_NPC = maps_NCHW.float().permute(0, 2, 3, 1).flatten(1, 2)  # rows of memory where channels are last: fast
    mean_N1C = pixels_NPC.mean(dim=1, keepdim=True)
    variance_NC = (pixels_NPC - mean_N1C).square().mean(dim=1)
    return torch.cat([mean_N1C[:, 0], (variance_NC + EPSILON).sqrt()], dim=1)


def patch_px(stem: str) -> int | None:
    """N of a stem "patchN", None for another."""
    return int(stem.removeprefix("patch")) if stem.startswith("patch") else None


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Architecture(NamedTuple):
    """See ResNet."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    pooled: bool = False
    overlapping: bool = False
    moments: bool = False


RESNETS = {
    "resnet_tiny": Architecture(BasicBlock, (1, 1, 1), (32, 64, 128)),
    "resnet_small": Architecture(BasicBlock, (1, 1, 1), (64, 128, 256)),
    # resnet_small with narrower early stages, whose pixels cost most
    "resnet_slim": Architecture(BasicBlock, (1, 1, 1), (32, 96, 256)),
    "resnet_pool": Architecture(BasicBlock, (1, 1, 1), (64, 128, 256), pooled=True),
    # accuracy per operation: at 32 px and below what each of them gains is in docs/record.md
    "resnet_compact": Architecture(BasicBlock, (1, 1, 1), (64, 128, 256), pooled=True, overlapping=True, moments=True),
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
}


def resnet(name: str, *, stem: str, width: float = 1.0, in_channels: int = 3) -> ResNet:
    """A randomly initialized backbone by name.

    Args:
        name: a key of RESNETS.
        stem: see ResNet.
        width: factor on every stage's channels, rounded to multiples of 8.
        in_channels: C of the images.
    """
    made = RESNETS[name]
    scaled = tuple(max(8, round(channels * width / 8) * 8) for channels in made.widths)
    return ResNet(**made._replace(widths=scaled)._asdict(), stem=stem, in_channels=in_channels)


def in_hubs(name: str) -> bool:
    """Whether torchvision and timm have the same network under the same names."""
    return name in ("resnet18", "resnet34", "resnet50")
