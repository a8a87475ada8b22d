"""The fused numba backend against the torch backend, which is held against torchvision; and its bits."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numba.core.registry import CPUDispatcher
from reference_augment import EVERYTHING, augmentation, batch_of, knife_edges, pictures
from test_torch_ops import FLAT_JITTER, SINGLE, SIZES, run

from fastssl.augment.augment import Augment
from fastssl.augment.backend import BackendName, Images, Output, backend_of
from fastssl.augment.cpu import backend, policy
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import View

SMOOTH = replace(EVERYTHING, solarize_p=0, posterize_p=0)
CASES = SINGLE | {"linear hue": replace(FLAT_JITTER, hue=0.5, hue_mode="linear")}


MIXED = (
    EVERYTHING,
    replace(EVERYTHING, crop="pad", pad_px=5, blur_sigma_max_px=9.0, side_px=16),
    *(replace(EVERYTHING, crop=crop, area_max=0.7, cutout_fraction=0.3) for crop in ("center", "resize", "none")),
    replace(EVERYTHING, aspect_min=2.0, aspect_max=9.0, area_min=0.6),  # few of these boxes fit
)


def two_views(view: View, name: BackendName, dtype: torch.dtype = torch.float32) -> Augment:
    return augmentation((view, view), name, dtype=dtype)


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 11])
@pytest.mark.parametrize("epoch", [4, torch.tensor(2**40)])
def test_parameters_are_the_same_numbers(seed: int, epoch: int | torch.Tensor):
    sizes_B2 = torch.randint(1, 400, (500, 2), generator=torch.Generator().manual_seed(0))
    key = DrawKey(seed, epoch, torch.cat((torch.arange(499), torch.tensor([10**12]))), first=3)
    same, expected = (backend_of(name).sample_params(MIXED, key, sizes_B2) for name in ("cpu", "torch"))
    assert torch.equal(same.packed_BVP, expected.packed_BVP)


def test_functions_of_the_policy_round_alike_whoever_compiles_them():
    """numba gives a function without `fastmath` that of its first caller, and then a multiply and an add are one."""
    functions = [value for value in vars(policy).values() if isinstance(value, CPUDispatcher)]
    assert functions
    assert all(function.targetoptions["fastmath"] is False for function in functions)


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
        augment = two_views(SMOOTH, name)
        alone = torch.cat(
            [augment(batch_of(image[None], index_B[b : b + 1]), 5)[0] for b, image in enumerate(whole)], dim=1
        )
        for images, offsets in ((padded, None), (flat, offsets_B)):
            (views_VBCHW,) = augment(batch_of(images, index_B, sizes_B2, offsets), 5)
            assert (views_VBCHW - alone).abs().max() <= tolerance


def test_bits_do_not_depend_on_the_cut_the_order_or_the_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "WORTH_PX", 1)
    images, augment = pictures(37, 21, 34), two_views(EVERYTHING, "cpu")
    (whole,) = augment(batch_of(images), 5)
    parts = [augment(batch_of(images[i:j], torch.arange(i, j)), 5)[0] for i, j in ((0, 1), (1, 17), (17, 37))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(batch_of(images[order], order), 5)[0], whole[:, order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(augment(batch_of(images), 5)[0], whole)
    finally:
        torch.set_num_threads(threads)


THREADS = 1 + (os.cpu_count() or 1)  # the calling one and all helpers there may be


def test_threads_share_the_images_each_once():
    together, done = threading.Barrier(THREADS), list[int]()

    def work(first: int, last: int) -> None:
        if first < THREADS:  # the first ranges, of one image each, wait for each other
            together.wait(60)
        done.extend(range(first, last))

    backend._divide(work, THREADS, THREADS)
    assert sorted(done) == list(range(THREADS))
    done.clear()
    backend._divide(lambda first, last: done.extend(range(first, last)), 1000 * THREADS + 1, THREADS)
    assert sorted(done) == list(range(1000 * THREADS + 1))


def test_helpers_that_are_busy_elsewhere_are_not_waited_for():
    free, done = threading.Event(), list[int]()
    elsewhere = [backend._helpers().submit(free.wait, 60) for _ in range(THREADS)]
    backend._divide(lambda first, last: done.extend(range(first, last)), 100, THREADS)
    assert done == list(range(100))
    assert not any(one.done() for one in elsewhere)
    free.set()


def test_an_error_in_any_thread_is_the_callers():
    caller = threading.get_ident()

    def work(first: int, last: int) -> None:
        if threading.get_ident() != caller:
            raise MemoryError("of a helper")
        time.sleep(0.1)  # so that a helper gets a range

    with pytest.raises(MemoryError, match="of a helper"):
        backend._divide(work, 16 * THREADS, THREADS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_helpers_of_its_own():
    """A fork does not take threads along."""
    backend._helpers().submit(int).result()
    together = threading.Barrier(2)  # broken if no helper comes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is the point
        process = os.fork()
    if not process:
        try:
            backend._divide(lambda first, last: together.wait(10) and None, 2, 2)
        finally:
            os._exit(together.broken)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert ended == (process, 0)


def test_views_are_those_of_their_parameters():
    """The kernel draws for itself; views of several sides are made by several calls of it."""
    images, index_B = pictures(37, 21, 34), torch.arange(37) * 5
    views = (EVERYTHING, replace(EVERYTHING, crop="pad", pad_px=3), replace(SMOOTH, side_px=12))
    augment = augmentation(views, "cpu", seed=-7)
    batch = batch_of(images, index_B)
    groups = augment(batch, torch.tensor(3))
    params = augment.sample_params(batch, 3)
    sizes_B2 = torch.tensor([[21, 34]]).expand(37, 2)
    for group, (first, last) in zip(groups, ((0, 2), (2, 3)), strict=True):
        output = Output(augment.mean_C, augment.std_C, augment.dtype)
        rows = params.rows(first, last), views[first:last]
        assert torch.equal(group, augment.backend.apply(Images(images, sizes_B2, None), *rows, output))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [3, 7, 20])
def test_lines_shorter_and_longer_than_a_vector(side: int, channels: int):
    view, images = (
        replace(SINGLE["pad"], side_px=side, pad_px=2, hflip_p=0.5, vflip_p=0.5),
        pictures(9, side, side, channels),
    )
    mean_C = tuple(0.1 * (c + 1) for c in range(channels))
    found, expected = (
        augmentation((view,), name, mean_C=mean_C, std_C=(0.25,) * channels)(batch_of(images), 0)[0]
        for name in ("cpu", "torch")
    )
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("view", [EVERYTHING, SINGLE["crop"], SINGLE["bicubic crop"], SINGLE["pad"]])
def test_bfloat16_is_rounded_to_nearest(view: View):
    batch = batch_of(pictures(16, 32, 32))
    (wide,) = two_views(view, "cpu")(batch, 5)
    (narrow,) = two_views(view, "cpu", torch.bfloat16)(batch, 5)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["crop", "bicubic crop", "pad", "flips"])
def test_views_without_color_are_normalized_as_the_others(name: str):
    view, batch = SINGLE[name], batch_of(pictures(8, 32, 32))
    (found,) = two_views(view, "cpu")(batch, 5)
    assert (found - two_views(view, "torch")(batch, 5)[0]).abs().max() < 0.05 / 255 / 0.2
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_float16_is_converted():
    batch = batch_of(pictures(4, 21, 34))
    (narrow,) = two_views(EVERYTHING, "cpu", torch.float16)(batch, 5)
    assert torch.equal(narrow, two_views(EVERYTHING, "cpu")(batch, 5)[0].half())


def test_lays_channels_last():
    (views_VBCHW,) = two_views(EVERYTHING, "cpu")(batch_of(pictures(4, 21, 34)), 5)
    assert views_VBCHW.shape == (2, 4, 3, 32, 32)
    assert views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_gives_no_views():
    (views_VBCHW,) = two_views(EVERYTHING, "cpu")(batch_of(pictures(4, 21, 34)[:0]), 5)
    assert views_VBCHW.shape == (2, 0, 3, 32, 32)


def test_the_stamp_covers_every_module_the_kernels_come_from():
    """numba's disk cache watches the file of the kernel alone: the rest must change the stamp."""
    script = "import sys, fastssl.augment.cpu.backend as b\n" + (
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('fastssl.augment.')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    files = {Path(line).resolve() for line in done.stdout.splitlines()}
    assert {"draws.py", "policy.py", "constants.py", "lanes.py"} <= {path.name for path in files}
    assert files <= {path.resolve() for path in backend.STAMPED}
