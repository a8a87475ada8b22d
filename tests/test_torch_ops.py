"""The torch applier against torchvision's functional forms, one view at a time."""

from dataclasses import replace

import torch
from fastssl.augment.engine import Augment
from reference_augment import CIFAR, augmented


def test_chain_equals_torchvision():
    view = replace(CIFAR, hue=0.1, jitter_order="random", blur_p=0.5, solarize_p=0.3, hflip_p=0.5)
    augment = Augment((view, view), (0.0,) * 3, (1.0,) * 3, 0, torch.float32, "torch")
    images = torch.randint(
        0, 256, (16, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    index_B = torch.arange(16)
    (views_VBCHW,) = augment(images, index_B, 3)
    drawn = augment.parameters(index_B, 3, torch.tensor([[40, 48]] * 16))
    for b in range(16):
        for v in range(2):
            expected = augmented(images[b], drawn, b, v, view, augment.mean_C)
            torch.testing.assert_close(views_VBCHW[v, b], expected, atol=1e-4, rtol=0)
