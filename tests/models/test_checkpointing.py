"""Gradient checkpointing: the same values, gradients and statistics, from fewer saved activations."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastssl.errors import UserError
from fastssl.models.checkpointing import checkpoint_blocks
from fastssl.models.hub import require_timm
from fastssl.models.resnet import resnet


def trained_once(backbone: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], int]:
    """Features, gradients, statistics, and the bytes that autograd saved outside of checkpointed blocks."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = backbone(images)
        features.square().sum().backward()
    gradients = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
    return features.detach(), gradients, [buffer.clone() for buffer in backbone.buffers()], sum(saved.values())


def assert_same_but_smaller(backbone: nn.Module, images: Tensor, *, blocks: int) -> None:
    plain, checked = copy.deepcopy(backbone), copy.deepcopy(backbone)
    assert checkpoint_blocks(checked) == blocks
    assert list(plain.state_dict()) == list(checked.state_dict())
    (h, gradients, statistics, most), (h2, gradients2, statistics2, fewer) = (
        trained_once(network.train(), images) for network in (plain, checked)
    )
    assert torch.equal(h, h2)
    torch.testing.assert_close(gradients, gradients2, rtol=0, atol=0)
    torch.testing.assert_close(statistics, statistics2, rtol=0, atol=0)
    assert fewer < 0.6 * most


def test_a_resnet_is_the_same_from_fewer_activations() -> None:
    assert_same_but_smaller(resnet("resnet18", stem="cifar", width=0.25), torch.randn(4, 3, 16, 16), blocks=8)


def test_a_vit_of_timm_too() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    require_timm()
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=3)
    assert_same_but_smaller(vit, torch.randn(2, 3, 32, 32), blocks=3)


def test_evaluation_and_frozen_statistics_are_left_alone() -> None:
    backbone = resnet("resnet_tiny", stem="patch2", width=0.25)
    plain = copy.deepcopy(backbone).eval()
    checkpoint_blocks(backbone.eval())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain(images), backbone(images))


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no repeated blocks"):
        checkpoint_blocks(nn.Linear(3, 3))
