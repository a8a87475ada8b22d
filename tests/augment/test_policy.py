"""Parameters obey the policy: probabilities, ranges, boxes as torchvision draws them, mistakes by name."""

from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from reference_augment import CIFAR, EVERYTHING
from torchvision.transforms import RandomResizedCrop

from fastssl.augment.draws import DrawKey, draws
from fastssl.augment.policy import SLOTS, Column, Parameters, Slot, View
from fastssl.augment.sampling import sample_params
from fastssl.recipe.schema import ViewSpec

COUNT = 4000


def sampled(*views: View, height: int = 40, width: int = 60, count: int = COUNT) -> Parameters:
    draws_BVS = draws(DrawKey(0, 0, torch.arange(count), 0), views=len(views), slots=SLOTS)
    return sample_params(views, draws_BVS, torch.tensor([[height, width]]).expand(count, 2))


def on_share(happened: torch.Tensor) -> float:
    return happened.float().mean().item()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_probabilities(p: float):
    chances = {name: p for name in View.__slots__ if name.endswith("_p")}
    params = sampled(replace(EVERYTHING, **chances))
    happened = {
        "hflip": params[Column.HFLIP] > 0,
        "vflip": params[Column.VFLIP] > 0,
        "quarter turn": params[Column.TURNS] > 0,
        "rotate": params[Column.ROTATE_DEG] != 0,
        "jitter": params[Column.BRIGHTNESS] != 1,
        "gray": params[Column.GRAY] > 0,
        "blur": params[Column.BLUR_SIGMA_PX] > 0,
        "solarize": params[Column.SOLARIZE] <= 1,
        "posterize": params[Column.POSTERIZE_BITS] > 0,
        "cutout": params[Column.CUTOUT_SIDE] > 0,
    }
    for name, mask in happened.items():
        assert on_share(mask) == pytest.approx(p, abs=5 * (p * (1 - p) / COUNT) ** 0.5), name


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        (Column.BRIGHTNESS, 0.6, 1.4),
        (Column.CONTRAST, 0.7, 1.3),
        (Column.SATURATION, 0.0, 2.2),
        (Column.HUE, -0.2, 0.2),
        (Column.ROTATE_DEG, -30, 30),
        (Column.BLUR_SIGMA_PX, 0.1, 2.0),
    ],
)
def test_amounts_are_uniform_in_their_range(column: Column, low: float, high: float):
    view = replace(
        EVERYTHING, jitter_p=1, rotate_p=1, blur_p=1, brightness=0.4, contrast=0.3, saturation=1.2, hue=0.2,
        rotate_max_deg=30,
    )  # fmt: skip
    amount = (sampled(view)[column][:, 0] - low) / (high - low)
    assert amount.min() >= -1e-6
    assert amount.max() <= 1 + 1e-6
    assert amount.mean().item() == pytest.approx(0.5, abs=5 / (12 * COUNT) ** 0.5)
    assert amount.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_orders_are_equally_likely_and_fixed_is_the_first():
    view = replace(CIFAR, jitter_p=1, jitter_order="random")
    counts = torch.bincount(sampled(view)[Column.ORDER].flatten().long(), minlength=24)
    assert len(counts) == 24
    assert ((counts - COUNT / 24) ** 2 / (COUNT / 24)).sum() < 23 + 5 * 6.8
    assert sampled(replace(view, jitter_order="fixed"))[Column.ORDER].max() == 0


def test_quarter_turns_are_equally_likely():
    counts = torch.bincount(sampled(replace(CIFAR, quarter_turn_p=1))[Column.TURNS].flatten().long(), minlength=4)
    assert counts[0] == 0
    assert ((counts[1:] - COUNT / 3) ** 2 / (COUNT / 3)).sum() < 2 + 5 * 2


def box(params: Parameters) -> torch.Tensor:
    return torch.stack([params[c] for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH)], dim=-1)


def ks_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest gap between two samples' distribution functions."""
    places = torch.cat((one, other)).unique()
    parts = [torch.searchsorted(x.sort().values, places, right=True) / len(x) for x in (one, other)]
    return (parts[0] - parts[1]).abs().max().item()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 60), (300, 7)])
def test_random_boxes_are_distributed_as_torchvision_draws_them(height: int, width: int):
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(COUNT)])
    ours = box(sampled(CIFAR, height=height, width=width))[:, 0]
    for side in range(4):
        assert ks_distance(ours[:, side], theirs[:, side].float()) < 1.95 * (2 / COUNT) ** 0.5  # p = 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10)])
def test_a_box_that_cannot_fit_becomes_the_largest_centered_one(height: int, width: int):
    theirs = RandomResizedCrop.get_params(torch.zeros(1, height, width), (0.9, 1.0), (3 / 4, 4 / 3))
    ours = box(sampled(replace(CIFAR, area_min=0.9), height=height, width=width, count=3))
    assert ours[:, 0].tolist() == [list(map(float, theirs))] * 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (3, 2), (500, 375)])
def test_random_boxes_stay_inside_and_hold_a_pixel(height: int, width: int):
    top, left, box_height, box_width = box(sampled(CIFAR, height=height, width=width)).unbind(-1)
    assert torch.stack((top, left)).min() >= 0
    assert torch.stack((box_height, box_width)).min() >= 1
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width


def test_boxes_of_the_other_crops():
    rows = [replace(CIFAR, crop=kind, area_max=0.25, pad_px=4) for kind in ("resize", "center", "none", "pad")]
    boxes = box(sampled(*rows, height=40, width=60))
    assert boxes[:, 0].unique(dim=0).tolist() == [[0, 0, 40, 60]]
    assert boxes[:, 1].unique(dim=0).tolist() == [[10, 20, 20, 20]]
    assert boxes[:, 2].unique(dim=0).tolist() == [[4, 14, 32, 32]]
    shifts = boxes[:, 3]
    assert shifts[:, 2:].unique(dim=0).tolist() == [[40, 60]]
    assert shifts[:, :2].unique().tolist() == list(range(-4, 5))
    assert torch.bincount((shifts[:, 0] + 4).long()).min() > COUNT / 9 * 0.75


def test_cutout_lies_inside_the_view():
    params = sampled(replace(CIFAR, cutout_p=1, cutout_fraction=0.5))
    assert params[Column.CUTOUT_SIDE].unique().tolist() == [16]
    assert params[Column.CUTOUT_TOP].unique().tolist() == list(range(17))


def test_parameters_do_not_depend_on_the_batch():
    draws_BVS = draws(DrawKey(0, 0, torch.arange(37), 0), views=2, slots=SLOTS)
    sizes_B2 = torch.stack((torch.arange(37) + 1, torch.arange(37) * 3 + 5), dim=1)
    views = (EVERYTHING, replace(EVERYTHING, side_px=9, crop="pad", pad_px=3))
    whole = sample_params(views, draws_BVS, sizes_B2).packed_BVP
    parts = [sample_params(views, draws_BVS[i : i + 1], sizes_B2[i : i + 1]).packed_BVP for i in range(37)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_view_has_the_fields_and_choices_of_the_recipe():
    """The recipe decides defaults and limits; the rest has a copy, for augment knows no recipe."""
    ours = {field.name: get_type_hints(View)[field.name] for field in fields(View)}
    theirs = {name: field.annotation for name, field in ViewSpec.model_fields.items()}
    assert list(ours) == list(theirs)
    for name, kind in ours.items():
        assert kind is theirs[name] or get_args(kind) == get_args(theirs[name]) != (), name


def test_draws_and_columns_keep_their_places():
    """Renumbering a slot would change every recorded run."""
    assert (Slot.AREA, Slot.ASPECT, Slot.TOP, Slot.CUTOUT_LEFT, SLOTS) == (0, 10, 20, 41, 42)
    assert list(Column) == list(range(len(Column)))
