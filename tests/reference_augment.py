"""The slow, obvious augmentation: torchvision one image and one view at a time, and the hash in Python."""

from dataclasses import replace

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from fastssl.augment.augment import Augment
from fastssl.augment.backend import BackendName, backend_of
from fastssl.augment.policy import JITTER_ORDERS, Column, Parameters, View
from fastssl.data.batch import Batch

CIFAR = View(
    side_px=32,
    crop="random_resized",
    area_min=0.08,
    area_max=1.0,
    aspect_min=3 / 4,
    aspect_max=4 / 3,
    interpolation="bilinear",
    pad_px=0,
    hflip_p=0.5,
    vflip_p=0.0,
    quarter_turn_p=0.0,
    rotate_p=0.0,
    rotate_max_deg=0.0,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.0,
    hue_mode="hsv",
    jitter_order="fixed",
    gray_p=0.2,
    blur_p=0.0,
    blur_sigma_min_px=0.1,
    blur_sigma_max_px=2.0,
    solarize_p=0.0,
    solarize_threshold=0.5,
    posterize_p=0.0,
    posterize_bits=4,
    cutout_p=0.0,
    cutout_fraction=0.5,
)

EVERYTHING = replace(
    CIFAR,
    hue=0.1,
    jitter_order="random",
    **{name: 0.5 for name in View.__slots__ if name.endswith("_p")},
    rotate_max_deg=30.0,
    solarize_threshold=0.437,
)


def augmentation(
    rows: tuple[View, ...],
    backend: BackendName,
    *,
    mean_C: tuple[float, ...] = (0.4, 0.5, 0.6),
    std_C: tuple[float, ...] = (0.2, 0.25, 0.3),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Augment:
    return Augment(rows, mean_C, std_C, seed, dtype, backend_of(backend))


def unnormalized(rows: tuple[View, ...], backend: BackendName, channels: int = 3) -> Augment:
    """Its views are in [0, 1]."""
    return augmentation(rows, backend, mean_C=(0.0,) * channels, std_C=(1.0,) * channels)


def batch_of(
    images: Tensor, index_B: Tensor | None = None, sizes_B2: Tensor | None = None, offsets_B: Tensor | None = None
) -> Batch:
    """A batch without labels; by default it is the first of its data set."""
    if index_B is None:
        index_B = torch.arange(len(images if offsets_B is None else offsets_B), device=images.device)
    return Batch(images, torch.full_like(index_B, -1), index_B, sizes_B2, offsets_B)


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator (Steele, Lea, Flood 2014) in unbounded integers."""
    mask, outputs = 2**64 - 1, []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def uniform(seed: int, epoch: int, index: int, view: int, slot: int) -> float:
    """One draw: each level takes the word-th output of the generator seeded by the level above."""
    key = 0
    for word in (seed, epoch, index, view, slot):
        key = splitmix64(key + word * 0x9E3779B97F4A7C15, 1)[0]
    return (key >> 40) / 2**24


def augmented(image_HWC: Tensor, params: Parameters, b: int, v: int, view: View, mean_C: tuple[float, ...]) -> Tensor:
    """One view (C, S, S) in [0, 1], before normalization."""
    p = {column: params[column][b, v].item() for column in Column}
    x = image_HWC.permute(2, 0, 1).float() / torch.iinfo(image_HWC.dtype).max
    x = cropped(x, p, view)
    x = TF.hflip(x) if p[Column.HFLIP] else x
    x = TF.vflip(x) if p[Column.VFLIP] else x
    x = torch.rot90(x, int(p[Column.TURNS]), (-2, -1))
    if p[Column.ROTATE_DEG]:
        x = TF.rotate(x, p[Column.ROTATE_DEG], interpolation=InterpolationMode.BILINEAR)
    if x.shape[0] == 3:
        x = colored(x, p)
    if p[Column.BLUR_RADIUS_PX]:
        x = TF.gaussian_blur(x, 2 * int(p[Column.BLUR_RADIUS_PX]) + 1, p[Column.BLUR_SIGMA_PX])
    if p[Column.SOLARIZE] <= 1:
        x = TF.solarize(x, p[Column.SOLARIZE])
    if p[Column.POSTERIZE_BITS]:
        x = TF.posterize(x, int(p[Column.POSTERIZE_BITS]))
    top, left, square = (int(p[c]) for c in (Column.CUTOUT_TOP, Column.CUTOUT_LEFT, Column.CUTOUT_SIDE))
    return TF.erase(x, top, left, square, square, torch.tensor(mean_C)[:, None, None]) if square else x


def cropped(x: Tensor, p: dict[Column, float], view: View) -> Tensor:
    margin = view.side_px + view.pad_px  # torchvision's own crop goes wrong when the box misses the image
    x = TF.pad(x, [margin] * 4)
    top, left, height, width = (int(p[c]) for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH))
    box = (top + margin, left + margin, height, width)
    mode = InterpolationMode(view.interpolation)
    side = [view.side_px, view.side_px]
    return TF.resized_crop(x, *box, side, interpolation=mode, antialias=True).clamp(0, 1)


def colored(x: Tensor, p: dict[Column, float]) -> Tensor:
    steps = (
        (TF.adjust_brightness, p[Column.BRIGHTNESS]),
        (TF.adjust_contrast, p[Column.CONTRAST]),
        (TF.adjust_saturation, p[Column.SATURATION]),
        (TF.adjust_hue, p[Column.HUE]),
    )
    for operation in JITTER_ORDERS[int(p[Column.ORDER])]:
        adjust, amount = steps[operation]
        x = adjust(x, amount)
    return TF.rgb_to_grayscale(x, num_output_channels=3) if p[Column.GRAY] else x


def pictures(count: int, height: int, width: int, channels: int = 3, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random images (count, H, W, C) over the whole range: smooth, noisy, flat and saturated in turn."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.rand(count, channels, height, width, generator=generator)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    x = torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, smooth, noise)
    x[2::8] = x[2::8].mean(dim=(1, 2, 3), keepdim=True)
    x[3::8] = (x[3::8] > 0.5).float()
    return (x * torch.iinfo(dtype).max).round().to(torch.int32).to(dtype).permute(0, 2, 3, 1).contiguous()


def knife_edges(view: View, before: Tensor) -> Tensor:
    """Where solarize or posterize make a last-bit difference a jump; `before` is the view without them."""
    edges = torch.zeros_like(before, dtype=torch.bool)
    if view.solarize_p:
        edges |= (before - view.solarize_threshold).abs() < 1e-5
    if view.posterize_p:
        levels = before * 2**view.posterize_bits
        edges |= (levels - levels.round()).abs() < 1e-3
    return edges
