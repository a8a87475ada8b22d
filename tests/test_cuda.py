"""The fused Triton applier against the torch applier: on the GPU, or under Triton's interpreter where there is none.

The interpreter is chosen as Triton is imported, so the tests that launch kernels then run in a process of their own.
What only a compiler can refuse is compiled for Hopper here, which needs no GPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_augment import CIFAR, EVERYTHING, knife_edges, pictures
from test_torch_ops import FLAT_JITTER, MEAN_C, NOTHING, SINGLE, SIZES
from torch import Tensor

from fastssl.augment import cuda, torch_ops
from fastssl.augment.draws import draws
from fastssl.augment.engine import Augment
from fastssl.augment.policy import View

NATIVE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if NATIVE else "cpu"
STD_C = (0.2, 0.25, 0.3)
SMOOTH = replace(EVERYTHING, solarize_p=0, posterize_p=0)
STILL = replace(SMOOTH, rotate_p=0)  # a rotation is never done in one pass
CASES = SINGLE | {"linear hue": replace(FLAT_JITTER, hue=0.5, hue_mode="linear")}
CLOSE = 0.05 / 255

launches = pytest.mark.skipif(not (NATIVE or INTERPRETED), reason="runs under the interpreter, in its own process")


@pytest.mark.skipif(NATIVE or INTERPRETED, reason="the kernels already run in this process")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
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
    if sizes_B2 is None:
        sizes_B2 = torch.tensor([images.shape[1:3]] * len(images))
    mean_C, std_C = (0.0,) * channels, (1.0,) * channels
    augment = Augment(rows, mean_C, std_C, 0, torch.float32, "torch")
    drawn = augment.parameters(torch.arange(len(sizes_B2)), 3, sizes_B2)
    wanted = torch_ops.apply(images, sizes_B2, offsets_B, drawn, rows, mean_C, std_C, torch.float32)
    moved = [x if x is None else x.to(DEVICE) for x in (images, sizes_B2, offsets_B)]
    drawn = replace(drawn, packed_BVP=drawn.packed_BVP.to(DEVICE))
    return cuda.apply(*moved, drawn, rows, mean_C, std_C, dtype).float().cpu(), wanted


def difference(view: View, images: Tensor, **arguments) -> float:
    rows, channels = (view, view), images.shape[-1]
    actual, wanted = rendered(rows, images, channels=channels, **arguments)
    before = replace(view, solarize_p=0, posterize_p=0, cutout_p=0)
    edges = knife_edges(view, rendered((before, before), images, channels=channels)[1])
    return (actual - wanted).abs().masked_fill(edges, 0).max().item()


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of 17 px and more take several tiles, and their images go by in groups."""
    monkeypatch.setattr(cuda, "TILE_PX", 16)
    monkeypatch.setattr(cuda, "WHOLE_PX", 0)
    monkeypatch.setattr(cuda, "SCRATCH_BYTES", 2**14)


@launches
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 + 11])
@pytest.mark.parametrize("epoch", [0, 1, 2**40, torch.tensor(7)])
def test_draws_are_the_same_bits(seed: int, epoch: int | Tensor):
    index_B = torch.tensor([0, 1, 2, 12345, 2**31, 2**62], device=DEVICE)
    epoch = epoch.to(DEVICE) if isinstance(epoch, Tensor) else epoch
    same = cuda.draws(seed, epoch, index_B, views=3, slots=60)
    assert torch.equal(same, draws(seed, epoch, index_B, views=3, slots=60))


@launches
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("side", "height", "width"), SIZES)
def test_operations_equal_torch(name: str, side: int, height: int, width: int):
    assert difference(replace(CASES[name], side_px=side), pictures(2, height, width)) < CLOSE


@launches
@pytest.mark.parametrize("name", CASES)
def test_operations_over_tiles_equal_torch(name: str, tiled: None):
    assert difference(replace(CASES[name], side_px=21), pictures(3, 40, 17)) < CLOSE


@launches
@pytest.mark.parametrize("view", [STILL, SMOOTH])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_other_channel_counts(view: View, channels: int):
    assert difference(replace(view, side_px=12), pictures(4, 17, 14, channels)) < CLOSE


@launches
def test_other_channel_counts_over_tiles(tiled: None):
    assert difference(replace(SMOOTH, side_px=18), pictures(3, 17, 14, 4)) < CLOSE


@launches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint16(dtype: torch.dtype):
    tolerance = CLOSE if dtype == torch.float32 else 0.5 / 255
    assert difference(replace(STILL, side_px=12), pictures(6, 17, 14, dtype=torch.uint16), dtype=dtype) < tolerance


@launches
@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 0.3), (torch.bfloat16, 0.7)])
@pytest.mark.parametrize("view", [STILL, replace(STILL, interpolation="bicubic"), SMOOTH])
def test_half_precision_is_within_a_level(view: View, dtype: torch.dtype, levels: float, tiled: None):
    assert difference(replace(view, side_px=20), pictures(6, 37, 50), dtype=dtype) < levels / 255


@launches
def test_flat_images_stay_flat_in_half_precision():
    images = torch.full((2, 37, 50, 3), 201, dtype=torch.uint8)
    view = replace(CIFAR, interpolation="bicubic", jitter_p=0, gray_p=0)
    actual, _ = rendered((view,), images, torch.float16)
    assert (actual == torch.tensor(201 / 255).half()).all()


@launches
def test_rows_of_unlike_kind():
    rows = tuple(
        replace(STILL, side_px=12, interpolation=interpolation, hue_mode=hue_mode)
        for interpolation in ("bilinear", "bicubic")
        for hue_mode in ("hsv", "linear")
    )
    actual, wanted = rendered(rows, pictures(4, 17, 14))
    assert (actual - wanted).abs().max() < CLOSE


@launches
@pytest.mark.parametrize("flat", [False, True])
def test_padded_and_flat_images(flat: bool, tiled: None):
    whole = [pictures(1, 10 + b, 30 - 2 * b)[0] for b in range(6)]
    sizes_B2 = torch.tensor([image.shape[:2] for image in whole])
    padded = torch.full((6, 20, 32, 3), 255, dtype=torch.uint8)
    for b, image in enumerate(whole):
        padded[b, : image.shape[0], : image.shape[1]] = image
    offsets_B = torch.tensor([0, *(image.numel() for image in whole[:-1])]).cumsum(0)
    images = torch.cat([image.flatten() for image in whole]) if flat else padded
    rows = (replace(SMOOTH, side_px=18, crop="pad", pad_px=3), replace(SMOOTH, side_px=18))
    actual, wanted = rendered(rows, images, sizes_B2=sizes_B2, offsets_B=offsets_B if flat else None)
    assert (actual - wanted).abs().max() < CLOSE


@launches
def test_the_engine_normalises_and_lays_channels_last():
    images, index_B = pictures(4, 21, 34), torch.arange(4)
    rows = (replace(NOTHING, side_px=12), replace(NOTHING, side_px=12, crop="none"), replace(NOTHING, side_px=7))
    parts = Augment(rows, MEAN_C, STD_C, 0, torch.bfloat16, "cuda")(images.to(DEVICE), index_B.to(DEVICE), 5)
    wanted = Augment(rows, MEAN_C, STD_C, 0, torch.float32, "torch")(images, index_B, 5)
    assert [part.shape for part in parts] == [(2, 4, 3, 12, 12), (1, 4, 3, 7, 7)]
    for part, want in zip(parts, wanted, strict=True):
        assert part.dtype == torch.bfloat16
        assert part.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(part.float().cpu(), want, atol=0.01, rtol=0.01)


@launches
def test_bits_do_not_depend_on_the_cut(tiled: None):
    images, index_B = pictures(5, 21, 34).to(DEVICE), torch.arange(5, device=DEVICE)
    augment = Augment((replace(EVERYTHING, side_px=20),) * 2, MEAN_C, STD_C, 0, torch.bfloat16, "cuda")
    (whole,) = augment(images, index_B, 5)
    parts = [augment(images[i:j], index_B[i:j], 5)[0] for i, j in ((0, 1), (1, 5))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@launches
def test_an_empty_batch_gives_no_views():
    augment = Augment((CIFAR, CIFAR), MEAN_C, STD_C, 0, torch.float32, "cuda")
    empty = torch.zeros((0, 8, 8, 3), dtype=torch.uint8, device=DEVICE)
    assert augment(empty, torch.arange(0, device=DEVICE), 5)[0].shape == (2, 0, 3, 32, 32)
