"""The promises of `Augment` on its output: a stream for each sample and view, rows of one side together."""

from dataclasses import replace

import pytest
import torch
from reference_augment import CIFAR, EVERYTHING, augmentation, batch_of, pictures

BACKENDS = ["torch", "cpu"]
EVALUATE = replace(CIFAR, crop="resize", hflip_p=0, jitter_p=0, gray_p=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_two_samples_or_views_share_parameters(backend: str):
    same = pictures(1, 40, 40).expand(48, -1, -1, -1)
    (views_VBCHW,) = augmentation((CIFAR,) * 3, backend)(batch_of(same), 0)
    flat = views_VBCHW.flatten(0, 1).flatten(1)
    distance = torch.cdist(flat, flat) + 1e9 * torch.eye(len(flat))
    assert distance.min() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_epoch_change_every_view(backend: str):
    batch = batch_of(pictures(16, 40, 40))
    (first,) = augmentation((CIFAR,) * 2, backend)(batch, 0)
    for other in (
        augmentation((CIFAR,) * 2, backend, seed=1)(batch, 0)[0],
        augmentation((CIFAR,) * 2, backend)(batch, 1)[0],
    ):
        assert (first - other).abs().amax(dim=(2, 3, 4)).min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_side_come_as_one_tensor(backend: str):
    small = replace(CIFAR, side_px=16, area_max=0.4)
    rows = (CIFAR, EVERYTHING, small, small, small, CIFAR)
    batch = batch_of(pictures(4, 40, 40))
    groups = augmentation(rows, backend)(batch, 0)
    assert [tuple(group.shape) for group in groups] == [
        (2, 4, 3, 32, 32),
        (3, 4, 3, 16, 16),
        (1, 4, 3, 32, 32),
    ]
    (plain,) = augmentation((CIFAR,) * 2, backend)(batch, 0)
    torch.testing.assert_close(groups[0][0], plain[0], atol=1e-5, rtol=0)  # a row's place is its only name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_evaluation_view_is_the_normalized_image(backend: str):
    images = pictures(8, 32, 32)
    (views_VBCHW,) = augmentation((EVALUATE,), backend)(batch_of(images), 0)
    mean, std = torch.tensor((0.4, 0.5, 0.6)), torch.tensor((0.2, 0.25, 0.3))
    plain = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(views_VBCHW[0], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thirty_two_views(backend: str):
    (views_VBCHW,) = augmentation((replace(CIFAR, side_px=8),) * 32, backend)(batch_of(pictures(2, 9, 9)), 0)
    assert views_VBCHW.shape == (32, 2, 3, 8, 8)
    assert len(views_VBCHW[:, 0].flatten(1).unique(dim=0)) == 32
