"""The fused Triton backend against the torch backend: on the GPU, or under Triton's interpreter where there is none.

The interpreter is chosen as Triton is imported, so the tests that launch kernels then run in a process of their own.
What only a compiler can refuse is in test_cuda_compiles.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_augment import (
    CIFAR,
    EVERYTHING,
    augmentation,
    batch_of,
    knife_edges,
    pictures,
    unnormalized,
)
from test_cpu import MIXED
from test_torch_ops import FLAT_JITTER, NOTHING, SINGLE
from torch import Tensor

from fastssl.augment.augment import sizes_of
from fastssl.augment.backend import Images, Output, backend_of
from fastssl.augment.cuda import backend
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import View
from fastssl.recipe import schema
from fastssl.recipe.presets import view_table

NATIVE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if NATIVE else "cpu"
SMOOTH = replace(EVERYTHING, solarize_p=0, posterize_p=0)
STILL = replace(SMOOTH, rotate_p=0)  # a rotation is never done in one pass
CASES = SINGLE | {"linear hue": replace(FLAT_JITTER, hue=0.5, hue_mode="linear")}
# what a tile does otherwise than a whole view
TILED = ("bicubic crop", "wide pad", "quarter turns", "rotation", "jitter", "linear hue", "wide blur", "everything")
SIZES = [(32, 32, 32), (7, 33, 20), (16, 1, 1), (1, 13, 8)]  # side, height, width
CLOSE = 0.05 / 255
BFLOAT16 = (0.7 if NATIVE else 1.1) / 255  # the interpreter cuts bits off, the hardware rounds

launches = pytest.mark.skipif(not (NATIVE or INTERPRETED), reason="runs under the interpreter, in its own process")


@pytest.mark.skipif(NATIVE or INTERPRETED, reason="the kernels already run in this process")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def rendered(
    rows: tuple[View, ...],
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    sizes_B2: Tensor | None = None,
    offsets_B: Tensor | None = None,
    channels: int = 3,
) -> tuple[Tensor, Tensor]:
    """Views (V, B, C, S, S) in [0, 1] by Triton and by torch, from the same parameters."""
    if images.ndim == 4:
        channels = images.shape[-1]
    batch = batch_of(images, None, sizes_B2, offsets_B)
    augment = unnormalized(rows, "torch", channels)
    params = augment.sample_params(batch, 3)
    (wanted,) = augment(batch, 3)
    moved = Images(*(x if x is None else x.to(DEVICE) for x in (images, sizes_of(batch), offsets_B)))
    params = replace(params, packed_BVP=params.packed_BVP.to(DEVICE))
    output = Output(augment.mean_C, augment.std_C, dtype)
    return backend_of("cuda").apply(moved, params, rows, output).float().cpu(), wanted


def differences(rows: dict[str, View], images: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Largest difference of each row, off the edges where one in the last bit becomes a jump."""
    actual, wanted = rendered(tuple(rows.values()), images, dtype)
    before = tuple(replace(view, solarize_p=0, posterize_p=0, cutout_p=0) for view in rows.values())
    plain = torch_ops_only(before, images)
    worst = {}
    for v, (name, view) in enumerate(rows.items()):
        difference = (actual[v] - wanted[v]).abs().masked_fill(knife_edges(view, plain[v]), 0)
        worst[name] = difference.max().item()
    return worst


def torch_ops_only(rows: tuple[View, ...], images: Tensor) -> Tensor:
    return unnormalized(rows, "torch", images.shape[-1])(batch_of(images), 3)[0]


def far(worst: dict[str, float], tolerance: float) -> dict[str, float]:
    return {name: difference for name, difference in worst.items() if not difference < tolerance}


@pytest.fixture(scope="module", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """It searches all of Triton for functions to replace whenever a function is called; once a module is enough."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    slow, seen = InterpretedFunction.__call__, set()

    def call(self: InterpretedFunction, *arguments: Any, **named: Any) -> Any:
        if id(self.fn.__globals__) in seen:
            return self.rewrite()(*arguments, **named)
        seen.add(id(self.fn.__globals__))
        return slow(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of 17 px and more take several tiles, and their images go by in groups."""
    monkeypatch.setattr(backend, "TILE_PX", 16)
    monkeypatch.setattr(backend, "WHOLE_PX", 0)
    monkeypatch.setattr(backend, "WHOLE_EXACT_PX", 0)
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 2**14)
    monkeypatch.setattr(backend, "GROUP", 2)


@launches
@pytest.mark.parametrize(("seed", "epoch"), [(-5, torch.tensor(7)), (2**63 + 11, 2**40)])
def test_parameters_are_the_same_numbers(seed: int, epoch: int | Tensor):
    index_B = torch.tensor([0, 1, 2, 12345, 2**31, 2**62], device=DEVICE)
    sizes_B2 = torch.tensor([[32, 32], [1, 9], [375, 500], [33, 64], [64, 33], [7, 300]], device=DEVICE)
    epoch = epoch.to(DEVICE) if isinstance(epoch, Tensor) else epoch
    key = DrawKey(seed, epoch, index_B, first=3)
    same, expected = (backend_of(name).sample_params(MIXED, key, sizes_B2) for name in ("cuda", "torch"))
    assert torch.equal(same.packed_BVP, expected.packed_BVP)


@launches
def test_views_are_those_of_their_parameters():
    """Drawn and cut by one call, or cut from parameters that are handed over."""
    batch = batch_of(pictures(3, 21, 34).to(DEVICE))
    augment = augmentation((replace(EVERYTHING, side_px=12, hue_mode="linear"),) * 2, "cuda", seed=-7)
    (views_VBCHW,) = augment(batch, 3)
    images, output = Images(batch.images, sizes_of(batch), None), Output(augment.mean_C, augment.std_C, augment.dtype)
    params = augment.sample_params(batch, torch.tensor(3, device=DEVICE))
    assert torch.equal(views_VBCHW, augment.backend.apply(images, params, augment.views, output))


@launches
@pytest.mark.parametrize(("side", "height", "width"), SIZES)
def test_operations_equal_torch(side: int, height: int, width: int):
    rows = {name: replace(view, side_px=side) for name, view in CASES.items() if view.rotate_p == 0}
    assert not far(differences(rows, pictures(1, height, width)), CLOSE)


@launches
def test_operations_over_tiles_equal_torch(tiled: None):
    """The rows that rotate send the others, too, through every pass."""
    rows = {name: replace(CASES[name], side_px=18) for name in TILED}
    assert not far(differences(rows, pictures(1, 30, 17)), CLOSE)


@launches
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(channels: int):
    rows = {"still": replace(STILL, side_px=12), "bicubic": replace(STILL, side_px=12, interpolation="bicubic")}
    assert not far(differences(rows, pictures(2, 17, 14, channels)), CLOSE)


@launches
@pytest.mark.parametrize(("channels", "view"), [(1, SMOOTH), (4, STILL)])
def test_other_channel_counts_over_tiles(channels: int, view: View, tiled: None):
    assert not far(differences({"view": replace(view, side_px=18)}, pictures(2, 17, 14, channels)), CLOSE)


@launches
def test_without_contrast_the_first_pass_colors(tiled: None):
    view = replace(STILL, side_px=18, contrast=0.0)
    assert not backend._plan((view,), 3, torch.uint8, exact=True).waits
    assert not far(differences({"view": view}, pictures(2, 17, 14)), CLOSE)


@launches
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, CLOSE), (torch.bfloat16, BFLOAT16)])
def test_uint16(dtype: torch.dtype, tolerance: float):
    images = pictures(2, 17, 14, dtype=torch.uint16)
    assert not far(differences({"still": replace(STILL, side_px=12)}, images, dtype), tolerance)


@launches
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.3 / 255), (torch.bfloat16, BFLOAT16)])
def test_half_precision_is_within_a_level(dtype: torch.dtype, tolerance: float, tiled: None):
    rows = {"still": STILL, "bicubic": replace(STILL, interpolation="bicubic"), "rotated": SMOOTH}
    rows = {name: replace(view, side_px=20) for name, view in rows.items()}
    assert not far(differences(rows, pictures(1, 37, 50), dtype), tolerance)


@launches
def test_flat_images_stay_flat_in_half_precision():
    images = torch.full((2, 37, 50, 3), 201, dtype=torch.uint8)
    view = replace(CIFAR, interpolation="bicubic", jitter_p=0, gray_p=0)
    actual, _ = rendered((view,), images, torch.float16)
    assert (actual == torch.tensor(201 / 255).half()).all()


@launches
@pytest.mark.parametrize("preset", ["none", "cifar", "stl", "imagenet", "imagenet_asymmetric", "multicrop"])
def test_presets(preset: str, tiled: None):
    specs = view_table(schema.Augment(preset=preset, side_px=20, views=2))
    rows = {str(v): View(**spec.model_dump()) for v, spec in enumerate(specs)}
    assert not far(differences(rows, pictures(1, 27, 40)), CLOSE)


@launches
@pytest.mark.parametrize("flat", [False, True])
def test_padded_and_flat_images(flat: bool, tiled: None):
    whole = [pictures(1, 10 + b, 30 - 2 * b)[0] for b in range(3)]
    sizes_B2 = torch.tensor([image.shape[:2] for image in whole])
    padded = torch.full((3, 20, 32, 3), 255, dtype=torch.uint8)
    for b, image in enumerate(whole):
        padded[b, : image.shape[0], : image.shape[1]] = image
    offsets_B = torch.tensor([0, *(image.numel() for image in whole[:-1])]).cumsum(0)
    images = torch.cat([image.flatten() for image in whole]) if flat else padded
    rows = (replace(SMOOTH, side_px=18, crop="pad", pad_px=3), replace(SMOOTH, side_px=18))
    actual, wanted = rendered(rows, images, sizes_B2=sizes_B2, offsets_B=offsets_B if flat else None)
    assert (actual - wanted).abs().max() < CLOSE


@launches
def test_the_engine_normalizes_and_lays_channels_last():
    images = pictures(4, 21, 34)
    rows = (replace(NOTHING, side_px=12), replace(NOTHING, side_px=12, crop="none"), replace(NOTHING, side_px=7))
    parts = augmentation(rows, "cuda", dtype=torch.bfloat16)(batch_of(images.to(DEVICE)), 5)
    wanted = augmentation(rows, "torch")(batch_of(images), 5)
    assert [part.shape for part in parts] == [(2, 4, 3, 12, 12), (1, 4, 3, 7, 7)]
    for part, want in zip(parts, wanted, strict=True):
        assert part.dtype == torch.bfloat16
        assert part.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(part.float().cpu(), want, atol=0.01, rtol=0.01)


@launches
def test_bits_do_not_depend_on_the_cut(tiled: None):
    images, index_B = pictures(3, 21, 34).to(DEVICE), torch.arange(3, device=DEVICE)
    augment = augmentation((replace(EVERYTHING, side_px=20),) * 2, "cuda", dtype=torch.bfloat16)
    (whole,) = augment(batch_of(images), 5)
    parts = [augment(batch_of(images[i:j], index_B[i:j]), 5)[0] for i, j in ((0, 1), (1, 3))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@launches
def test_an_empty_batch_gives_no_views():
    empty = torch.zeros((0, 8, 8, 3), dtype=torch.uint8, device=DEVICE)
    assert augmentation((CIFAR, CIFAR), "cuda")(batch_of(empty), 5)[0].shape == (2, 0, 3, 32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
def test_a_captured_step_follows_its_inputs():
    batch = batch_of(pictures(8, 64, 80).to(DEVICE))
    epoch = torch.zeros((), dtype=torch.int64, device=DEVICE)
    augment = augmentation((replace(EVERYTHING, side_px=96),) * 2, "cuda", dtype=torch.bfloat16)
    expected = [augment(batch, torch.full_like(epoch, e))[0].clone() for e in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (views_VBCHW,) = augment(batch, epoch)
    for e, want in enumerate(expected):
        epoch.fill_(e)
        graph.replay()
        assert torch.equal(views_VBCHW, want)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
def test_never_waits_for_the_device():
    batch = batch_of(pictures(8, 64, 80).to(DEVICE))
    augment = augmentation((replace(EVERYTHING, side_px=96),) * 2, "cuda", dtype=torch.bfloat16)
    augment(batch, torch.zeros((), dtype=torch.int64, device=DEVICE))
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(batch, torch.ones((), dtype=torch.int64, device=DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")
