"""Changes of the CPU recipe's network that no setting expresses, each for half an epoch next to the network as it was.

python bench/networks.py [RECIPE] [--seeds 3] [--only NAME ...]

The network is `resnet_small` with the `patch2` stem. Accuracy on 5,000 held-out images at equal views and equal seeds,
so runs may share the machine. Finished runs are not repeated. Writes bench/results/networks.json.
"""

import argparse
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from claims import as_command, at_least_one, refuse_unmeasured  # noqa: E402
from record import BASE, Done, folder_of, lever_rows, text, trained  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fastssl import build  # noqa: E402
from fastssl.bench.record import record, save  # noqa: E402
from fastssl.data.beton.reader import Beton  # noqa: E402
from fastssl.models import backbones  # noqa: E402
from fastssl.models.resnet import BasicBlock, ResNet, initialize  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402

Edit = Callable[[ResNet, Recipe], None]
AS_IT_WAS = [
    "model.backbone=resnet_small",
    "optim.schedule=cosine",
    "evaluate.whitened_knn=false",
]
SHORT = ["data.fraction=0.5", "train.epochs=1", "train.threads=1", "evaluate.linear_epochs=0"]
PATCH_IMAGES, PATCHES = 2_000, 200_000


def blocks(net: ResNet) -> list[BasicBlock]:
    return [module for module in net.modules() if isinstance(module, BasicBlock)]


def stem(kernel_px: int) -> Edit:
    """The first convolution with a stride of 2 and a kernel of its own, so that patches overlap."""

    def edit(net: ResNet, recipe: Recipe) -> None:
        padding = (kernel_px - 1) // 2
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, kernel_px, stride=2, padding=padding, bias=False)
        initialize(net.conv1)

    return edit


def whitening(net: ResNet, recipe: Recipe) -> None:
    """Filters of the first convolution: the whitened principal directions of its patches, and their negatives."""
    side = net.conv1.kernel_size[0]
    images, some = Beton(recipe.data.path), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=some)[:PATCH_IMAGES]
    pixels = torch.stack([torch.from_numpy(images.image(int(i)).copy()) for i in chosen]).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    cut = ((pixels - mean) / std).permute(0, 3, 1, 2).unfold(2, side, 1).unfold(3, side, 1)
    patches = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * side * side)
    patches = patches[torch.randperm(len(patches), generator=some)[:PATCHES]]
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = (vectors / torch.sqrt(values + 5e-4)).T.flip(0)
    both = torch.cat([filters, -filters]).reshape(-1, 3, side, side)[: net.conv1.out_channels]
    with torch.no_grad():
        net.conv1.weight[: len(both)] = 0.3 * both


def pooling(pool: type[nn.Module]) -> Edit:
    """2x2 pixels become one before each later stage, whose convolutions have no stride."""

    def edit(net: ResNet, recipe: Recipe) -> None:
        for name in net.stages[1:]:
            first, *others = getattr(net, name)
            first.conv1.stride = first.downsample[0].stride = (1, 1)
            setattr(net, name, nn.Sequential(pool(2), first, *others))

    return edit


def averaged_shortcuts(net: ResNet, recipe: Recipe) -> None:
    """ResNet-D (He et al. 2018): the shortcut averages, then a 1x1 convolution without stride."""
    for block in blocks(net):
        if block.downsample is not None:
            convolution, norm = block.downsample
            plain = nn.Conv2d(convolution.in_channels, convolution.out_channels, 1, bias=False)
            block.downsample = nn.Sequential(nn.AvgPool2d(2), plain, norm)


def activation(kind: type[nn.Module]) -> Edit:
    def edit(net: ResNet, recipe: Recipe) -> None:
        for module in (net, *blocks(net)):
            module.relu = kind()

    return edit


def zero_last_norms(net: ResNet, recipe: Recipe) -> None:
    """Each block begins as its shortcut."""
    for block in blocks(net):
        nn.init.zeros_(block.bn2.weight)


def linear_end(net: ResNet, recipe: Recipe) -> None:
    """No ReLU after the last block."""

    def forward(self: BasicBlock, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = y + (x if self.downsample is None else self.downsample(x))
        return out

    last = blocks(net)[-1]
    last.forward = types.MethodType(forward, last)  # type: ignore[method-assign]


def means_of_two_stages(self: ResNet, x: Tensor) -> Tensor:
    x, means = self.relu(self.bn1(self.conv1(x))), []
    for name in self.stages:
        x = getattr(self, name)(x)
        means.append(x.mean((2, 3)))
    return torch.cat(means[-2:], dim=1)


def two_stages(net: ResNet, recipe: Recipe) -> None:
    """Features are the means of the last two stages, next to each other."""
    net.forward = types.MethodType(means_of_two_stages, net)  # type: ignore[method-assign]


def normed_features(net: ResNet, recipe: Recipe) -> None:
    """Batch norm after the pooled features."""
    net.add_module("last", nn.BatchNorm1d(net.features_dim))

    def forward(self: ResNet, x: Tensor) -> Tensor:
        normed: Tensor = self.last(ResNet.forward(self, x))
        return normed

    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]


def normed_two_stages(net: ResNet, recipe: Recipe) -> None:
    """The means of the last two stages, then batch norm."""
    net.add_module("last", nn.BatchNorm1d(sum(getattr(net, name)[-1].bn2.num_features for name in net.stages[-2:])))

    def forward(self: ResNet, x: Tensor) -> Tensor:
        normed: Tensor = self.last(means_of_two_stages(self, x))
        return normed

    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]


def normed_moments(net: ResNet, recipe: Recipe) -> None:
    """The means and standard deviations of all stages, then batch norm."""
    net.add_module("last", nn.BatchNorm1d(2 * sum(getattr(net, name)[-1].bn2.num_features for name in net.stages)))

    def forward(self: ResNet, x: Tensor) -> Tensor:
        x, parts = self.relu(self.bn1(self.conv1(x))), []
        for name in self.stages:
            x = getattr(self, name)(x)
            parts += [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt()]
        normed: Tensor = self.last(torch.cat(parts, dim=1))
        return normed

    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]


def wide_end(channels: int) -> Edit:
    """A 1x1 convolution with batch norm and ReLU before the mean over pixels."""

    def edit(net: ResNet, recipe: Recipe) -> None:
        convolution = nn.Conv2d(net.features_dim, channels, 1, bias=False)
        initialize(convolution)
        end = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        name = net.stages[-1]
        setattr(net, name, nn.Sequential(*getattr(net, name), end))

    return edit


TRIALS: dict[str, list[Edit]] = {
    BASE: [],
    "averaging between stages": [pooling(nn.AvgPool2d)],
    "maximum between stages": [pooling(nn.MaxPool2d)],
    "averaging on shortcuts": [averaged_shortcuts],
    "stem 3x3": [stem(3)],
    "stem 4x4": [stem(4)],
    "stem 6x6": [stem(6)],
    "stem 4x4, averaging between stages": [stem(4), pooling(nn.AvgPool2d)],
    "stem 4x4, averaging on shortcuts": [stem(4), averaged_shortcuts],
    "whitening filters": [whitening],
    "stem 4x4, whitening filters, averaging on shortcuts": [stem(4), whitening, averaged_shortcuts],
    "SiLU": [activation(nn.SiLU)],
    "GELU": [activation(nn.GELU)],
    "last norms begin at zero": [zero_last_norms],
    "no last ReLU": [linear_end],
    "features of two stages": [two_stages],
    "batch norm of features": [normed_features],
    "stem 4x4, averaging, normed features of two stages": [stem(4), pooling(nn.AvgPool2d), normed_two_stages],
    "stem 4x4, averaging, normed moments of all stages": [stem(4), pooling(nn.AvgPool2d), normed_moments],
    "stem 4x4, averaging, 1,024 channels at the end": [stem(4), pooling(nn.AvgPool2d), wide_end(1024)],
}


def run(recipe: Recipe, edits: Sequence[Edit], folder: Path) -> Done:
    """The run with an edited network, trained first where it is not finished."""
    original = backbones.backbone

    def built(*args: Any, **settings: Any) -> nn.Module:
        net = original(*args, **settings)
        for edit in edits:
            edit(net, recipe)
        return net

    with mock.patch.object(build.model.backbones, "backbone", built):
        return trained(recipe, folder)


def measured(base: Recipe, seeds: int, *, only: Sequence[str], out: Path) -> Mapping[str, list[Done]]:
    """The runs of each trial: those asked for, and of the others those that are finished."""
    runs: dict[str, list[Done]] = {name: [] for name in TRIALS}
    for seed in range(seeds):
        for name, edits in TRIALS.items():
            folder = out / folder_of(name, seed)
            if not only or name in (BASE, *only) or (folder / "summary.json").exists():
                runs[name].append(run(load(base, [f"seed={seed}"]), edits, folder))
                print(f"{name}, seed {seed}", file=sys.stderr)
    return {name: done for name, done in runs.items() if done}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "cifar10_cpu.yaml"))
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", choices=TRIALS, help="train these, and the recipe"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/networks"))
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/networks.json")
    args = parser.parse_args(arguments)
    base = load(args.recipe, [*AS_IT_WAS, *SHORT])
    refuse_unmeasured(base, on_test=False)
    runs = measured(base, args.seeds, only=args.only, out=args.out)
    rows = lever_rows(runs, {}, {})
    found = sorted({done["commit"] for some in runs.values() for done in some})
    save(args.json, record("networks", rows, base.model_dump(mode="json")) | {"commits": found})
    print(text(rows))


if __name__ == "__main__":
    as_command(main)
