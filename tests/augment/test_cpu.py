"""The fused numba backend against the torch backend, which is held against torchvision; and its bits."""

from dataclasses import replace

import numba
import pytest
import torch
from reference_augment import EVERYTHING, knife_edges, pictures
from test_torch_ops import FLAT_JITTER, MEAN_C, SINGLE, SIZES, run

from fastssl.augment.augment import Augment
from fastssl.augment.cpu import backend
from fastssl.augment.draws import draws
from fastssl.augment.policy import SLOTS, View, parameters

SMOOTH = replace(EVERYTHING, solarize_p=0, posterize_p=0)
CASES = SINGLE | {"linear hue": replace(FLAT_JITTER, hue=0.5, hue_mode="linear")}


MIXED = (
    EVERYTHING,
    replace(EVERYTHING, crop="pad", pad_px=5, blur_sigma_max_px=9.0, side_px=16),
    *(replace(EVERYTHING, crop=crop, area_max=0.7, cutout_fraction=0.3) for crop in ("center", "resize", "none")),
    replace(EVERYTHING, aspect_min=2.0, aspect_max=9.0, area_min=0.6),  # few of these boxes fit
)


def engine(view: View, backend: str, dtype: torch.dtype = torch.float32) -> Augment:
    return Augment((view, view), MEAN_C, (0.2, 0.25, 0.3), 0, dtype, backend)


def test_draws_are_the_same_bits():
    index_B = torch.tensor([0, 1, 10**12])
    same = backend.draws(-5, torch.tensor(4), index_B, views=3, slots=42)
    assert torch.equal(same, draws(-5, 4, index_B, views=3, slots=42))


def test_parameters_are_the_same_numbers():
    sizes_B2 = torch.randint(1, 400, (500, 2), generator=torch.Generator().manual_seed(0))
    drawn_BVS = draws(3, 1, torch.arange(500), views=len(MIXED), slots=SLOTS)
    found, expected = backend.parameters(MIXED, drawn_BVS, sizes_B2), parameters(MIXED, drawn_BVS, sizes_B2)
    assert torch.equal(found.packed_BVP, expected.packed_BVP)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("side", "height", "width"), SIZES)
def test_operations_equal_torch(name: str, side: int, height: int, width: int):
    view, images = replace(CASES[name], side_px=side), pictures(8, height, width)
    before = run(replace(view, solarize_p=0, posterize_p=0, cutout_p=0), images)
    difference = (run(view, images, "cpu") - run(view, images)).abs().masked_fill(knife_edges(view, before), 0)
    assert difference.max() < 0.05 / 255


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_other_channel_counts(channels: int):
    view, images = replace(SMOOTH, side_px=12), pictures(8, 17, 14, channels)
    assert (run(view, images, "cpu") - run(view, images)).abs().max() < 0.05 / 255


def test_uint16():
    view, images = replace(SMOOTH, side_px=12), pictures(8, 17, 14, dtype=torch.uint16)
    assert (run(view, images, "cpu") - run(view, images)).abs().max() < 0.05 / 255


def test_padded_and_flat_images_give_the_bits_of_whole_ones():
    whole = [pictures(1, 10 + b, 30 - 2 * b)[0] for b in range(8)]
    sizes_B2 = torch.tensor([image.shape[:2] for image in whole])
    padded = torch.full((8, 20, 32, 3), 255, dtype=torch.uint8)
    for b, image in enumerate(whole):
        padded[b, : image.shape[0], : image.shape[1]] = image
    flat = torch.cat([image.flatten() for image in whole])
    offsets_B = torch.tensor([0, *(image.numel() for image in whole[:-1])]).cumsum(0)
    index_B = torch.arange(8)
    for name, tolerance in (("cpu", 0.0), ("torch", 1e-5)):
        augment = engine(SMOOTH, name)
        alone = torch.cat([augment(image[None], index_B[b : b + 1], 5)[0] for b, image in enumerate(whole)], dim=1)
        for images, offsets in ((padded, None), (flat, offsets_B)):
            (views_VBCHW,) = augment(images, index_B, 5, sizes_B2=sizes_B2, offsets_B=offsets)
            assert (views_VBCHW - alone).abs().max() <= tolerance


def test_bits_do_not_depend_on_the_cut_the_order_or_the_threads():
    images, augment = pictures(37, 21, 34), engine(EVERYTHING, "cpu")
    (whole,) = augment(images, torch.arange(37), 5)
    parts = [augment(images[i:j], torch.arange(i, j), 5)[0] for i, j in ((0, 1), (1, 17), (17, 37))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(images[order], order, 5)[0], whole[:, order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(augment(images, torch.arange(37), 5)[0], whole)
            assert numba.get_num_threads() == min(count, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(threads)


def test_views_are_those_of_their_parameters():
    """The kernel draws for itself; views of several sides are made by several calls of it."""
    images, index_B = pictures(37, 21, 34), torch.arange(37) * 5
    views = (EVERYTHING, replace(EVERYTHING, crop="pad", pad_px=3), replace(SMOOTH, side_px=12))
    augment = Augment(views, MEAN_C, (0.2, 0.25, 0.3), -7, torch.float32, "cpu")
    groups = augment(images, index_B, torch.tensor(3))
    sizes_B2 = torch.tensor([[21, 34]]).expand(37, 2)
    drawn = augment.parameters(index_B, 3, sizes_B2)
    for found, (first, last) in zip(groups, ((0, 2), (2, 3)), strict=True):
        arguments = drawn.rows(first, last), views[first:last], augment.mean_C, augment.std_C, augment.dtype
        assert torch.equal(found, backend.apply(images, sizes_B2, None, *arguments))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [3, 7, 20])
def test_lines_shorter_and_longer_than_a_vector(side: int, channels: int):
    view, images = (
        replace(SINGLE["pad"], side_px=side, pad_px=2, hflip_p=0.5, vflip_p=0.5),
        pictures(9, side, side, channels),
    )
    mean_C = tuple(0.1 * (c + 1) for c in range(channels))
    found, expected = (
        Augment((view,), mean_C, (0.25,) * channels, 0, torch.float32, backend)(images, torch.arange(9), 0)[0]
        for backend in ("cpu", "torch")
    )
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("view", [EVERYTHING, SINGLE["crop"], SINGLE["bicubic crop"], SINGLE["pad"]])
def test_bfloat16_is_rounded_to_nearest(view: View):
    images, index_B = pictures(16, 32, 32), torch.arange(16)
    (wide,) = engine(view, "cpu")(images, index_B, 5)
    (narrow,) = engine(view, "cpu", torch.bfloat16)(images, index_B, 5)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["crop", "bicubic crop", "pad", "flips"])
def test_views_without_color_are_normalized_as_the_others(name: str):
    view, images, index_B = SINGLE[name], pictures(8, 32, 32), torch.arange(8)
    (found,) = engine(view, "cpu")(images, index_B, 5)
    assert (found - engine(view, "torch")(images, index_B, 5)[0]).abs().max() < 0.05 / 255 / 0.2
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_float16_is_converted():
    images, index_B = pictures(4, 21, 34), torch.arange(4)
    (narrow,) = engine(EVERYTHING, "cpu", torch.float16)(images, index_B, 5)
    assert torch.equal(narrow, engine(EVERYTHING, "cpu")(images, index_B, 5)[0].half())


def test_lays_channels_last():
    (views_VBCHW,) = engine(EVERYTHING, "cpu")(pictures(4, 21, 34), torch.arange(4), 5)
    assert views_VBCHW.shape == (2, 4, 3, 32, 32)
    assert views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_gives_no_views():
    (views_VBCHW,) = engine(EVERYTHING, "cpu")(pictures(4, 21, 34)[:0], torch.arange(0), 5)
    assert views_VBCHW.shape == (2, 0, 3, 32, 32)


def test_the_disk_cache_watches_every_file_the_kernel_takes_in():
    inlined = {f.py_func.__module__ for f in (backend.resample, backend.settle, backend.transform, backend.interleave)}
    assert {name.rsplit(".", 1)[-1] + ".py" for name in inlined} <= set(backend.INLINED)
