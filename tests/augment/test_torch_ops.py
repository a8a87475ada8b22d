"""The torch backend against torchvision's functional forms, one image and one view at a time."""

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from reference_augment import (
    CIFAR,
    EVERYTHING,
    augmentation,
    augmented,
    batch_of,
    knife_edges,
    pictures,
    unnormalized,
)
from torch import Tensor

from fastssl.augment.policy import Column, View

NOTHING = replace(CIFAR, crop="resize", hflip_p=0, jitter_p=0, gray_p=0)
FLAT_JITTER = replace(NOTHING, jitter_p=1, brightness=0, contrast=0, saturation=0, hue=0)
SINGLE = {
    "crop": replace(NOTHING, crop="random_resized"),
    "bicubic crop": replace(NOTHING, crop="random_resized", interpolation="bicubic"),
    "tiny boxes": replace(NOTHING, crop="random_resized", area_min=1e-4, area_max=1e-3),
    "resize": NOTHING,
    "bicubic resize": replace(NOTHING, interpolation="bicubic"),
    "center": replace(NOTHING, crop="center", area_max=0.7656),
    "pad": replace(NOTHING, crop="pad", pad_px=4),
    "wide pad": replace(NOTHING, crop="pad", pad_px=50),
    "none": replace(NOTHING, crop="none"),
    "flips": replace(NOTHING, hflip_p=0.5, vflip_p=0.5),
    "quarter turns": replace(NOTHING, quarter_turn_p=0.8, hflip_p=0.5, vflip_p=0.5),
    "rotation": replace(NOTHING, rotate_p=1, rotate_max_deg=180.0),
    "brightness": replace(FLAT_JITTER, brightness=1.5),
    "contrast": replace(FLAT_JITTER, contrast=1.5),
    "saturation": replace(FLAT_JITTER, saturation=1.5),
    "hue": replace(FLAT_JITTER, hue=0.5),
    "jitter": replace(FLAT_JITTER, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, jitter_order="random"),
    "gray": replace(NOTHING, gray_p=1),
    "blur": replace(NOTHING, blur_p=1),
    "wide blur": replace(NOTHING, blur_p=1, blur_sigma_min_px=5.0, blur_sigma_max_px=9.0),
    "solarize": replace(NOTHING, solarize_p=1, solarize_threshold=0.437),
    "posterize": replace(NOTHING, posterize_p=1, posterize_bits=3),
    "cutout": replace(NOTHING, cutout_p=1),
    "everything": EVERYTHING,
}
SIZES = [(32, 32, 32), (7, 33, 20), (48, 5, 9), (16, 1, 1), (1, 13, 8)]  # side, height, width


def run(view: View, images: Tensor, backend: str = "torch") -> Tensor:
    """Two views of each image, (2, B, C, S, S) in [0, 1]."""
    return unnormalized((view, view), backend, images.shape[-1])(batch_of(images), 3)[0]


def expected(view: View, images: Tensor) -> Tensor:
    augment = unnormalized((view, view), "torch", images.shape[-1])
    params = augment.sample_params(batch_of(images), 3)
    views = [
        torch.stack([augmented(image, params, b, v, view, augment.mean_C) for b, image in enumerate(images)])
        for v in range(2)
    ]
    return torch.stack(views)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(("side", "height", "width"), SIZES)
def test_operations_equal_torchvision(name: str, side: int, height: int, width: int):
    view = replace(SINGLE[name], side_px=side)
    images = pictures(8, height, width)
    before = run(replace(view, solarize_p=0, posterize_p=0, cutout_p=0), images)
    difference = (run(view, images) - expected(view, images)).abs().masked_fill(knife_edges(view, before), 0)
    assert difference.max() < 0.05 / 255


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_other_channel_counts_take_what_is_not_color(channels: int):
    view = replace(EVERYTHING, solarize_p=0, posterize_p=0, side_px=12)
    images = pictures(8, 17, 14, channels)
    assert (run(view, images) - expected(view, images)).abs().max() < 0.05 / 255


def test_uint16_uses_its_full_range():
    images = pictures(8, 17, 14, dtype=torch.uint16)
    view = replace(EVERYTHING, solarize_p=0, posterize_p=0, side_px=12)
    assert (run(view, images) - expected(view, images)).abs().max() < 0.05 / 255


UINT8_STEPS = {
    "brightness": (Column.BRIGHTNESS, TF.adjust_brightness),
    "contrast": (Column.CONTRAST, TF.adjust_contrast),
    "saturation": (Column.SATURATION, TF.adjust_saturation),
    "hue": (Column.HUE, TF.adjust_hue),
}


@pytest.mark.parametrize("name", UINT8_STEPS)
def test_single_steps_are_within_two_levels_of_torchvision_on_uint8(name: str):
    """There torchvision truncates the gray and the result to whole levels."""
    view, images = SINGLE[name], pictures(16, 32, 32)
    column, step = UINT8_STEPS[name]
    augment = unnormalized((view,), "torch")
    factors_B = augment.sample_params(batch_of(images), 3)[column][:, 0].tolist()
    views_BCHW = augment(batch_of(images), 3)[0][0]
    whole = [step(image.permute(2, 0, 1), f) for image, f in zip(images, factors_B, strict=True)]
    assert (views_BCHW * 255 - torch.stack(whole)).abs().max() < 2


def test_the_crop_is_within_two_levels_of_torchvision_on_uint8():
    """There torchvision rounds to whole levels between the axes and after; it also clips bicubic between."""
    view, images = SINGLE["crop"], pictures(16, 50, 40)
    params = unnormalized((view,), "torch").sample_params(batch_of(images), 3)
    for b, image in enumerate(images):
        box = [int(params[c][b, 0]) for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH)]
        whole = TF.resized_crop(image.permute(2, 0, 1), *box, [32, 32], antialias=True)
        assert (run(view, images)[0, b] * 255 - whole).abs().max() < 2


def test_linear_hue_keeps_gray_and_turns_back():
    view = replace(FLAT_JITTER, hue=0.5, hue_mode="linear")
    gray = pictures(8, 32, 32, 1).expand(-1, -1, -1, 3).contiguous()
    unchanged = gray.permute(0, 3, 1, 2).float() / 255
    assert (run(view, gray)[0] - unchanged).abs().max() < 0.6 / 255  # the published matrices are rounded
    assert (run(view, pictures(8, 32, 32)) - run(NOTHING, pictures(8, 32, 32))).abs().max() > 0.1


def test_normalizes_and_lays_channels_last():
    images = pictures(8, 32, 32)
    augment = augmentation((NOTHING, NOTHING), "torch", dtype=torch.bfloat16)
    (views_VBCHW,) = augment(batch_of(images), 0)
    mean_C11, std_C11 = (torch.tensor(x)[:, None, None] for x in (augment.mean_C, augment.std_C))
    plain = (images.permute(0, 3, 1, 2) / 255 - mean_C11) / std_C11
    assert views_VBCHW.dtype == torch.bfloat16
    assert views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views_VBCHW[0].float(), plain, atol=0.02, rtol=0.01)


def test_cutout_normalizes_to_zero():
    view = replace(NOTHING, cutout_p=1, cutout_fraction=1.0)
    (views_VBCHW,) = augmentation((view,), "torch")(batch_of(pictures(4, 32, 32)), 0)
    assert views_VBCHW.abs().max() < 1e-6


@pytest.mark.parametrize(("view", "backend"), [(EVERYTHING, "eager"), (replace(CIFAR, hue=0.1), "inductor")])
def test_compiles_as_one_graph(view: View, backend: str):
    augment = augmentation((replace(view, side_px=8),) * 2, "torch")
    batch = batch_of(pictures(4, 9, 11))
    compiled = torch.compile(augment.__call__, fullgraph=True, dynamic=False, backend=backend)
    difference = (compiled(batch, torch.tensor(3))[0] - augment(batch, 3)[0]).abs()
    assert difference.max() < 1e-4


def test_every_chance_of_a_view_is_compared_on_every_backend():
    """SINGLE is what each backend is held against: a new operation must join it."""
    chances = {name for name in View.__slots__ if name.endswith("_p")}
    assert {name for name in chances if any(getattr(view, name) == 1 for view in SINGLE.values())} >= chances - {
        "hflip_p",
        "vflip_p",
        "quarter_turn_p",
    }
    assert all(any(getattr(view, name) > 0 for view in SINGLE.values()) for name in chances)
