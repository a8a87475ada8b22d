"""One job, three training loops: ours, lightly's parts combined as in its examples, and plain torchvision.

All take the same recipe with two views: the same images from memory, the same network with the same first weights, the
same loss and weight, the same optimizer and learning rates, the same precision. What a loop adds is its own. A loop is
(backbone, iterator): the iterator does one step each time and yields how many images that took.

V = 2 views, B images.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

PACKAGES = Path(__file__).resolve().parent / "packages"
sys.path.append(str(PACKAGES))  # where lightly lies when it is installed for this comparison alone

from fastssl import build  # noqa: E402
from fastssl.augment.policy import View  # noqa: E402
from fastssl.bench.parts import parts  # noqa: E402
from fastssl.data.beton.reader import Beton  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402

Loop = tuple[nn.Module, Iterator[int]]


def fastssl(recipe: Recipe, workers: int) -> Loop:
    """As `fastssl train` does it; threads instead of workers."""
    made = parts(recipe)
    learning_rate = build.optim.learning_rate(recipe, steps_per_epoch=len(made.loader))

    def steps() -> Iterator[int]:
        for step, views in zip(range(recipe.train.epochs * len(made.loader)), made.trained_on(), strict=False):
            made.train_step(views, learning_rate(step))
            yield made.batch_size

    return made.plain.backbone, steps()


class Images(torch.utils.data.Dataset):
    """Decoded images in memory, as torchvision.datasets.CIFAR10 keeps them: no file is opened, no JPEG decoded."""

    def __init__(self, path: Path, indices: Tensor) -> None:
        beton = Beton(path)
        self.images = [Image.fromarray(beton.image(int(i))) for i in indices]
        self.transform: Callable[[Any], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), 0


def train_images(recipe: Recipe) -> Images:
    labels = build.data.labels_of(recipe.data.path)
    return Images(recipe.data.path, build.data.sets(recipe, labels, labels).train)


def lightly(recipe: Recipe, workers: int) -> Loop:
    """lightly's transform, dataset and loss."""
    from lightly.data import LightlyDataset
    from lightly.loss import BarlowTwinsLoss, VICRegLoss
    from lightly.transforms import BYOLView1Transform
    from lightly.transforms.multi_view_transform import MultiViewTransform

    view, manifest = build.views.table(recipe)[0], build.data.manifest_of(recipe.data.path)
    transform = BYOLView1Transform(
        input_size=view.side_px,
        cj_prob=view.jitter_p,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        min_scale=view.area_min,
        random_gray_scale=view.gray_p,
        gaussian_blur=view.blur_p,
        solarization_prob=view.solarize_p,
        hf_prob=view.hflip_p,
        normalize={"mean": manifest.mean, "std": manifest.std},
    )
    dataset = LightlyDataset.from_torch_dataset(train_images(recipe), transform=MultiViewTransform([transform] * 2))
    weights = build.losses.weights(recipe, recipe.model.projector[-1])
    criterion: Any
    match recipe.loss.name:
        case "barlow_twins":
            criterion = BarlowTwinsLoss(lambda_param=weights["redundancy_weight"])
        case "vicreg":
            invariance, variance, covariance = weights.values()
            criterion = VICRegLoss(lambda_param=invariance, mu_param=variance, nu_param=covariance)
    return hand_written(recipe, dataset, criterion, workers)


def plain(recipe: Recipe, workers: int) -> Loop:
    """torchvision's transforms, two crops of each image, and the loss in a dozen lines."""
    from torchvision import transforms as T

    view, manifest = build.views.table(recipe)[0], build.data.manifest_of(recipe.data.path)
    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    transform = T.Compose(
        [
            T.RandomResizedCrop(view.side_px, scale=(view.area_min, view.area_max)),
            T.RandomHorizontalFlip(view.hflip_p),
            T.RandomApply([jitter], p=view.jitter_p),
            T.RandomGrayscale(view.gray_p),
            T.ToTensor(),
            T.Normalize(manifest.mean, manifest.std),
        ]
    )
    dataset = train_images(recipe)
    dataset.transform = lambda image: (transform(image), transform(image))
    weight = build.losses.weights(recipe, recipe.model.projector[-1])["redundancy_weight"]
    return hand_written(recipe, dataset, lambda a, b: barlow_twins(a, b, weight), workers)


def barlow_twins(a_BD: Tensor, b_BD: Tensor, weight: float) -> Tensor:
    """Zbontar et al. 2021, as their repository writes it."""
    norm = nn.BatchNorm1d(a_BD.shape[1], affine=False)
    c_DD = norm(a_BD).T @ norm(b_BD) / len(a_BD)
    on = (torch.diagonal(c_DD) - 1).square().sum()
    off = c_DD.square().sum() - torch.diagonal(c_DD).square().sum()
    return on + weight * off


def hand_written(recipe: Recipe, dataset: Any, criterion: Callable[[Tensor, Tensor], Tensor], workers: int) -> Loop:
    """The loop that both peers' examples show: DataLoader, one forward pass a view, an optimizer of torch."""
    device = build.hardware.device(recipe)
    network = build.model.network(recipe, in_channels=3, device=device).to(memory_format=torch.contiguous_format)
    model = nn.Sequential(network.backbone, network.projector)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=recipe.data.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    optimizer = optimizer_of(recipe, model)
    learning_rate = build.optim.learning_rate(recipe, steps_per_epoch=len(loader))
    dtype = build.hardware.autocast(recipe)

    def steps() -> Iterator[int]:
        step = 0
        for _ in range(recipe.train.epochs):
            for (a_BCHW, b_BCHW), *_ in loader:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.zero_grad()
                with torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext():
                    a_BD, b_BD = (model(x.to(device, non_blocking=True)) for x in (a_BCHW, b_BCHW))
                criterion(a_BD.float(), b_BD.float()).backward()
                optimizer.step()
                step += 1
                yield len(a_BCHW)

    return network.backbone, steps()


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    spec = recipe.optim
    if spec.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
    return kind(model.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)


LOOPS: dict[str, Callable[[Recipe, int], Loop]] = {"fastssl": fastssl, "lightly": lightly, "plain torchvision": plain}


def note_of(name: str, recipe: Recipe) -> dict[str, str]:
    """What a peer does unlike ours, as the `note` of its rows; empty for ours."""
    if name not in LOOPS or name == "fastssl":
        return {}
    apart = "" if recipe.model.batch_norm == "per_view" else "; batch norm sees one view at a time"
    return {"note": f"contiguous memory{apart}"}


def fits(view: View) -> str:
    """What of a view the peers cannot do alike; empty when they can do it all."""
    odd = {
        "rotation": view.rotate_p or view.quarter_turn_p or view.vflip_p,
        "cutout": view.cutout_p,
        "posterize": view.posterize_p,
        "blur or solarize (plain)": view.blur_p or view.solarize_p,
        "a crop other than random_resized": view.crop != "random_resized",
    }
    return ", ".join(name for name, used in odd.items() if used)


def job_of(recipe: str, changes: list[str]) -> Recipe:
    """The recipe that every loop runs, its data made; ends the program where the peers cannot do it alike."""
    job = load(recipe, changes)
    build.data.ensure_data(job, only_train=True)
    views = build.views.table(job)
    odd = fits(views[0])
    if odd or len(views) != 2:
        sys.exit(f"The peers cannot do this recipe alike: {odd or 'they take two views'}.")
    return job
