"""Backbones of torchvision and timm as features, starting weights, and stages that stay as they are."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import fastssl
from fastssl import build
from fastssl.errors import UserError
from fastssl.models import backbones, hub, pretrainer, starting_weights
from fastssl.recipe.load import load

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "stem", "channels", "side", "dim"),
    [
        ("torchvision/resnet18", "cifar", 3, 32, 512),
        ("torchvision/convnext_tiny", "patch2", 4, 32, 768),
        ("torchvision/efficientnet_b0", "cifar", 1, 32, 1280),
        ("torchvision/vit_b_16", "imagenet", 3, 32, 768),
        ("timm/resnet18", "patch2", 1, 32, 512),
        ("timm/convnext_atto", "auto", 4, 32, 320),
        ("timm/efficientnet_b0", "cifar", 3, 32, 1280),
        ("timm/vit_tiny_patch16_224", "patch4", 3, 32, 192),
    ],
)
def test_published_backbones_give_pooled_features(name: str, stem: str, channels: int, side: int, dim: int) -> None:
    network = backbones.backbone(name, stem=stem, in_channels=channels, side_px=side)
    assert pretrainer.features_dim(network, side_px=side, in_channels=channels) == dim
    network.train()
    assert network(torch.randn(2, channels, side, side)).shape == (2, dim)


def test_a_small_stem_keeps_the_resolution_and_a_patch_stem_divides_it() -> None:
    small = backbones.backbone("torchvision/resnet18", stem="cifar", side_px=32)
    assert small.layer1(small.maxpool(small.conv1(torch.zeros(1, 3, 32, 32)))).shape[-1] == 32
    vit = backbones.backbone("timm/vit_tiny_patch16_224", stem="patch4", side_px=32)
    assert vit.patch_embed(torch.zeros(1, 3, 32, 32)).shape[1:3] == (8, 8)


def test_dropout_before_the_classifier_is_gone() -> None:
    network = backbones.backbone("torchvision/efficientnet_b0", stem="imagenet", side_px=32)
    assert not [module for module in network.classifier.modules() if isinstance(module, nn.Dropout)]


def test_the_printed_lines_build_the_same_network() -> None:
    stock = hub.stock("torchvision", "resnet18", stem="cifar", in_channels=4, side_px=32)
    names: dict[str, Any] = {}
    exec("\n".join(stock.code()), names)
    ours = backbones.backbone("resnet18", stem="cifar", in_channels=4)
    names["model"].load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 4, 32, 32)
    torch.testing.assert_close(names["model"].eval()(images), ours.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stem", "named"),
    [
        ("torchvision/resnet19", "auto", "torchvision/resnet1"),
        ("timm/convnext_atta", "auto", "timm/convnext_atto"),
        ("keras/resnet50", "auto", "timm/NAME"),
        ("timm/vit_tiny_patch16_224", "cifar", "patches of 16 px"),
        ("torchvision/vit_b_16", "patch2", "timm"),
    ],
)
def test_what_cannot_be_built_is_explained(name: str, stem: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        backbones.backbone(name, stem=stem, side_px=32)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny_recipe: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny_recipe["model"] = {"backbone": "timm/resnet18"}
    with pytest.raises(UserError, match=r"fastssl-vision\[timm\]"):
        build.preflight.check(load(tiny_recipe))


def recipe_from(tiny_recipe: dict[str, Any], **model: Any) -> Any:
    return load(tiny_recipe | {"model": {"backbone": "resnet18", "stem": "imagenet", "projector": [8]} | model})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_run_starts_from_a_file_of_torchvisions_weights(
    tmp_path: Path, tiny_recipe: dict[str, Any], suffix: str
) -> None:
    theirs = torchvision.models.resnet18()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    recipe = recipe_from(tiny_recipe, weights=str(path))
    network = build.model.network(recipe, in_channels=3, device=torch.device("cpu"))
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.backbone.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    four = build.model.network(recipe, in_channels=4, device=torch.device("cpu")).backbone.conv1.weight
    torch.testing.assert_close(four[:, 3], theirs.conv1.weight[:, 0] * 3 / 4)
    one = build.model.network(recipe, in_channels=1, device=torch.device("cpu")).backbone.conv1.weight
    torch.testing.assert_close(one[:, 0], theirs.conv1.weight.sum(1))


def test_weights_that_do_not_fit_are_named(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"conv1\.weight is \(64, 3, 7, 7\), not \(64, 3, 3, 3\)"):
        build.model.network(
            recipe_from(tiny_recipe, weights=str(path), stem="cifar"), in_channels=3, device=torch.device("cpu")
        )
    with pytest.raises(UserError, match="lacks layer"):
        build.model.network(
            recipe_from(tiny_recipe, weights=str(path), backbone="resnet34"), in_channels=3, device=torch.device("cpu")
        )
    with pytest.raises(UserError, match="does not exist"):
        build.preflight.check(recipe_from(tiny_recipe, weights="absent.pth"))


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(), path)
    with pytest.raises(UserError, match="no plain state_dict"):
        build.model.network(recipe_from(tiny_recipe, weights=str(path)), in_channels=3, device=torch.device("cpu"))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_that_cannot_be_downloaded_are_two_lines(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise OSError("the network is away")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", away)
    monkeypatch.setattr("timm.models._builder.load_pretrained", away)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", away)
    with pytest.raises(UserError, match="the network is away") as caught:
        starting_weights.download(library, "resnet18")
    assert "model.weights" in caught.value.fix


def test_frozen_stages_do_not_change_and_the_others_do(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"]["freeze"] = 2
    tiny_recipe["train"]["epochs"] = 1
    fastssl.train(tiny_recipe, run_dir=tmp_path / "run")
    before = build.model.network(load(tiny_recipe), in_channels=3, device=torch.device("cpu")).backbone.state_dict()
    after = fastssl.load(tmp_path / "run", device="cpu").backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if not name.startswith("layer3")}  # batch statistics included


def test_a_run_starts_from_an_earlier_one(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["train"]["epochs"] = 1
    fastssl.train(tiny_recipe, run_dir=tmp_path / "first")
    tiny_recipe["model"] |= {"weights": str(tmp_path / "first"), "freeze": ["conv1", "layer"]}
    fastssl.train(tiny_recipe, run_dir=tmp_path / "second")
    first, second = (fastssl.load(tmp_path / name, device="cpu").backbone for name in ("first", "second"))
    assert torch.equal(first.layer3[0].conv1.weight, second.layer3[0].conv1.weight)
    assert not torch.equal(first.bn1.running_mean, second.bn1.running_mean)


@pytest.mark.parametrize(
    ("name", "stages", "frozen", "trained"),
    [
        ("torchvision/convnext_tiny", 2, "features.1.0.block.0.weight", "features.2.0.weight"),
        ("timm/convnext_atto", 1, "stem.0.weight", "stages.1.blocks.0.conv_dw.weight"),
        ("timm/vit_tiny_patch16_224", 3, "blocks.2.mlp.fc2.weight", "blocks.3.norm1.weight"),
        ("torchvision/vit_b_16", 1, "conv_proj.weight", "encoder.layers.encoder_layer_1.ln_1.weight"),
    ],
)
def test_stages_of_published_backbones(name: str, stages: int, frozen: str, trained: str) -> None:
    network = backbones.backbone(name, stem="imagenet", side_px=32)
    assert starting_weights.freeze(network, stages) > 0
    assert not network.get_parameter(frozen).requires_grad
    assert network.get_parameter(trained).requires_grad


def test_freezing_what_is_not_there_is_explained() -> None:
    network = backbones.backbone("resnet18", stem="cifar")
    with pytest.raises(UserError, match="has 4 stages"):
        starting_weights.freeze(network, 5)
    with pytest.raises(UserError, match="layr1") as caught:
        starting_weights.freeze(network, ["layr1"])
    assert "layer1" in caught.value.fix
