"""The fused numba applier against the torch applier, which is held against torchvision."""

from dataclasses import replace

import torch
from fastssl.augment import cpu
from fastssl.augment.draws import draws
from fastssl.augment.engine import Augment
from reference_augment import CIFAR


def test_numba_draws_are_the_same_bits():
    index_B = torch.tensor([0, 1, 10**12])
    same = cpu.draws(-5, 4, index_B, views=3, slots=42)
    assert torch.equal(same, draws(-5, 4, index_B, views=3, slots=42))


def test_chain_equals_torch():
    view = replace(CIFAR, hue=0.1, jitter_order="random", blur_p=0.5, solarize_p=0.3, quarter_turn_p=0.5)
    slow = Augment((view, view), (0.0,) * 3, (1.0,) * 3, 0, torch.float32, "torch")
    images = torch.randint(
        0, 256, (16, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    (expected,) = slow(images, torch.arange(16), 3)
    (views_VBCHW,) = replace(slow, applier="cpu")(images, torch.arange(16), 3)
    torch.testing.assert_close(views_VBCHW, expected, atol=1e-4, rtol=0)
