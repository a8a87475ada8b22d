"""Backbones against torchvision with the same weights, projectors' shapes, and the Pretrainer's order of views."""

import pytest
import torch
import torchvision
from torch import nn

from fastssl.errors import UserError
from fastssl.models.backbones import backbone
from fastssl.models.pretrainer import Pretrainer, embed, features_dim, projector
from fastssl.models.resnet import RESNETS, moments_of
from fastssl.models.starting_weights import load_pretrained


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_features_equal_torchvisions_with_the_same_weights(name: str) -> None:
    ours = backbone(name, stem="imagenet").eval()
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in theirs.modules():  # non-trivial statistics, so that a missing norm would show
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("stem", ["cifar", "imagenet", "patch2"])
def test_every_backbone_says_its_features_dim(name: str, stem: str) -> None:
    network = backbone(name, stem=stem, width=0.25, in_channels=4).eval()
    assert network(torch.zeros(2, 4, 32, 32)).shape == (2, network.features_dim)


def test_small_image_stem_keeps_the_resolution() -> None:
    network = backbone("resnet18", stem="cifar", width=0.25)
    assert network.conv1(torch.zeros(1, 3, 32, 32)).shape[-1] == 32
    assert isinstance(network.maxpool, nn.Identity)


def test_pooled_stages_see_means_of_what_strided_ones_skip() -> None:
    """The same convolutions without strides behind means of 2x2 pixels: none is left out, and one pixel stays one."""
    pooled, strided = (backbone(name, stem="patch2", width=0.25).eval() for name in ("resnet_pool", "resnet_small"))
    shapes = [[parameter.shape for parameter in net.parameters()] for net in (pooled, strided)]
    assert shapes[0] == shapes[1]
    assert all(m.stride == (1, 1) for n, m in pooled.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1")
    for side, expected in ((6, 3), (7, 4), (1, 1)):
        x = torch.randn(2, 3, side, side)
        padded = nn.functional.pad(x, (0, side % 2, 0, side % 2), value=float("nan"))
        cells = padded.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        assert pooled.layer2[0](x).shape[-1] == expected
        torch.testing.assert_close(pooled.layer2[0](x), cells.nanmean(-1))
    assert pooled(torch.zeros(1, 3, 2, 2)).shape == (1, 64)


def test_compact_features_are_the_moments_of_all_stages_normed() -> None:
    """Against the same weights in a network without: means and deviations, centered and scaled over the batch."""
    compact, pooled = (backbone(name, stem="patch2", width=0.25) for name in ("resnet_compact", "resnet_pool"))
    assert compact.conv1.kernel_size == (4, 4)
    pooled.conv1 = compact.conv1
    pooled.load_state_dict(compact.state_dict(), strict=False)
    x = torch.randn(6, 3, 16, 16)
    assert pooled.conv1(x).shape[-2:] == (8, 8)
    seen: list[torch.Tensor] = []
    for stage in (pooled.layer1, pooled.layer2, pooled.layer3):
        stage.register_forward_hook(lambda module, given, out: seen.append(out))
    pooled(x)
    moments = [part for y in seen for part in (y.mean((2, 3)), (y.var((2, 3), correction=0) + 1e-5).sqrt())]
    of_all = torch.cat(moments, dim=1)
    expected = (of_all - of_all.mean(0)) / (of_all.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(compact(x), expected)
    assert compact.features_dim == compact.eval()(x).shape[1] == 224


def test_deviations_of_constant_maps_have_a_finite_gradient() -> None:
    """As after a ReLU that lets nothing through, and of maps of one pixel."""
    for shape in ((2, 3, 4, 4), (2, 3, 1, 1)):
        maps = torch.zeros(shape, requires_grad=True)
        moments_of(maps).sum().backward()
        assert maps.grad is not None
        torch.testing.assert_close(maps.grad, torch.full(shape, 1 / (shape[2] * shape[3])))


def test_weights_of_strided_stages_are_not_taken_for_pooled_ones() -> None:
    pooled, strided = (backbone(name, stem="patch2", width=0.25) for name in ("resnet_pool", "resnet_small"))
    for one, other in ((pooled, strided), (strided, pooled)):
        with pytest.raises(UserError):
            load_pretrained(one, other.state_dict(), origin="w.pth")


def test_projector_is_linear_norm_relu_without_biases_before_norms() -> None:
    layers = list(projector(8, widths=(16, 32, 4)).children())
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [layer.bias is None for layer in layers if isinstance(layer, nn.Linear)] == [True, True, False]
    assert isinstance(projector(8, widths=()), nn.Identity)


@pytest.mark.parametrize(
    ("norm", "bias", "kinds", "biases"),
    [
        ("layer", "auto", ["Linear", "LayerNorm", "ReLU", "Linear"], [True, True]),
        ("none", "auto", ["Linear", "ReLU", "Linear"], [True, True]),
        ("batch", "all", ["Linear", "BatchNorm1d", "ReLU", "Linear"], [True, True]),
        ("batch", "none", ["Linear", "BatchNorm1d", "ReLU", "Linear"], [False, False]),
    ],
)
def test_projectors_norm_and_biases_are_chosen(norm: str, bias: str, kinds: list[str], biases: list[bool]) -> None:
    made = projector(8, widths=(16, 4), norm=norm, bias=bias)
    layers = list(made.children())
    assert [type(layer).__name__ for layer in layers] == kinds
    assert [layer.bias is not None for layer in layers if isinstance(layer, nn.Linear)] == biases
    assert made(torch.randn(5, 8)).shape == (5, 4)


def test_pretrainer_keeps_views_and_images_in_order_over_groups() -> None:
    both = Pretrainer(backbone("resnet_tiny", stem="patch2", width=0.25), projector(32, widths=(6,))).eval()
    large, small = torch.randn(2, 3, 3, 16, 16), torch.randn(1, 3, 3, 8, 8)
    h_NF, z_VBD = both((large, small))
    assert z_VBD.shape == (3, 3, 6)
    one = both.backbone(large[1, 2][None])
    torch.testing.assert_close(h_NF[1 * 3 + 2][None], one)
    torch.testing.assert_close(z_VBD[2, 1], both.projector(both.backbone(small[0, 1][None]))[0])


def test_embed_uses_running_statistics_and_restores_the_mode() -> None:
    network = backbone("resnet_tiny", stem="patch2", width=0.25).train()
    images = torch.randn(4, 3, 16, 16)
    together = embed(network, images, autocast=None)
    torch.testing.assert_close(together[:1], embed(network, images[:1], autocast=None), rtol=1e-4, atol=1e-5)
    assert network.training


class TwoWhileTraining(torch.nn.Module):
    """Features, and in training mode a tuple of them, as googlenet gives with its auxiliary classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        h_NF = self.norm(images_NCHW).mean((2, 3))
        return (h_NF, h_NF) if self.training else h_NF


def test_a_backbone_that_gives_a_tuple_while_training_is_refused_and_left_as_it_was() -> None:
    network = TwoWhileTraining()
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert features_dim(network, side_px=8, in_channels=3) == 3
    with pytest.raises(UserError, match="gives tuple for 2 images in training mode"):
        features_dim(network, side_px=8, in_channels=3, training=True)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_train_without_them(name: str) -> None:
    network = backbone(f"torchvision/{name}", stem="auto", side_px=96)
    assert features_dim(network, side_px=96, in_channels=3, training=True) > 0
