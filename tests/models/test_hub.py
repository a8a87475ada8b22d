"""Backbones of torchvision and timm as features, starting weights, and stages that stay as they are."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as nnf

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


@pytest.mark.parametrize(("name", "side_px"), [("efficientnet_b0", 32), ("googlenet", 64), ("inception_v3", 96)])
def test_dropout_before_the_classifier_is_gone(name: str, side_px: int) -> None:
    network = backbones.backbone(f"torchvision/{name}", stem="imagenet", side_px=side_px)
    assert not [module for module in network.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize(("have", "channels"), [(3, 1), (3, 2), (3, 4), (3, 6), (3, 13), (4, 3), (13, 5)])
def test_a_first_kernel_for_other_channels_answers_equal_channels_as_before(have: int, channels: int) -> None:
    kernel_OCHW = torch.randn(8, have, 3, 3, generator=torch.Generator().manual_seed(0))
    x_B1HW = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    before = nnf.conv2d(x_B1HW.expand(-1, have, -1, -1), kernel_OCHW)
    after = nnf.conv2d(x_B1HW.expand(-1, channels, -1, -1), starting_weights.with_channels(kernel_OCHW, channels))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_printed_lines_build_the_same_network() -> None:
    hub_model = hub.hub_model("torchvision", "resnet18", stem="cifar", in_channels=4, side_px=32)
    names: dict[str, Any] = {}
    exec("\n".join(hub_model.code()), names)
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
    torch.testing.assert_close(four[:, 3], theirs.conv1.weight[:, 0] / 2)
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


def theirs(layers: int = 18) -> dict[str, torch.Tensor]:
    network: nn.Module = getattr(torchvision.models, f"resnet{layers}")()
    return network.state_dict()


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPED: dict[str, Any] = {
    "bare": lambda t: t,
    "module": lambda t: prefixed("module.", t),
    "state_dict": lambda t: {"state_dict": prefixed("module.", t), "epoch": 90, "best_acc1": torch.tensor(1.0)},
    "model": lambda t: {"model": t, "args": Namespace(lr=0.1)},
    "moco": lambda t: {
        "state_dict": prefixed("module.encoder_q.", t) | prefixed("module.encoder_k.", noise(t)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
    },
    "dino": lambda t: {"student": prefixed("module.backbone.", noise(t)), "teacher": prefixed("backbone.", t)},
    "lightning": lambda t: {
        "state_dict": prefixed("model.backbone.", t) | {"projection_head.layers.0.weight": torch.zeros(2, 2)},
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.4.0",
    },
    "compiled": lambda t: prefixed("_orig_mod.encoder.", t),
    "old": lambda t: {name: tensor for name, tensor in t.items() if not name.endswith("num_batches_tracked")},
}


def noise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_checkpoints_of_others_are_found_by_the_backbones_names(
    wrapping: str, tmp_path: Path, tiny_recipe: dict[str, Any]
) -> None:
    suffix = {"lightning": ".ckpt", "state_dict": ".pth.tar"}.get(wrapping, ".pth")
    tensors = theirs()
    torch.save(WRAPPED[wrapping](tensors), tmp_path / f"weights{suffix}")
    recipe = recipe_from(tiny_recipe, weights=str(tmp_path / f"weights{suffix}"))
    network = build.model.network(recipe, in_channels=3, device=torch.device("cpu"))
    for name, tensor in network.backbone.state_dict().items():
        if wrapping != "old" or not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, tensors[name]), name
    account = network.weights_account
    assert account is not None
    counters = sum(name.endswith("num_batches_tracked") for name in tensors)
    absent = counters if wrapping == "old" else 0
    assert (account.matched, len(account.absent)) == (len(tensors) - 2 - absent, absent)
    assert any(name.endswith("fc.weight") for name in account.left_over)
    assert account.sentence().count("\n") == 0
    assert f"{account.matched} tensors matched" in account.sentence()


def test_of_two_networks_in_one_file_the_choice_is_said(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    torch.save(WRAPPED["dino"](theirs()), tmp_path / "weights.pth")
    recipe = recipe_from(tiny_recipe, weights=str(tmp_path / "weights.pth"))
    account = build.model.network(recipe, in_channels=3, device=torch.device("cpu")).weights_account
    assert account is not None
    assert (account.place, account.also) == ("teacher/backbone", ("student/module.backbone",))
    assert "under teacher/backbone (also there: student/module.backbone)" in account.sentence()


def test_a_run_records_and_says_once_what_of_the_file_it_took(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["train"]["epochs"] = 1
    fastssl.train(tiny_recipe, run_dir=tmp_path / "first")
    assert not (tmp_path / "first" / "weights.json").exists()
    tiny_recipe["model"] |= {"weights": str(tmp_path / "first")}
    records: list[dict[str, Any]] = []
    fastssl.train(tiny_recipe, run_dir=tmp_path / "second", observe=records.append)
    said = [record["message"] for record in records if "tensors matched" in record.get("message", "")]
    account = json.loads((tmp_path / "second" / "weights.json").read_text())
    assert len(said) == 1
    assert f"{account['matched']} tensors matched under backbone" in said[0]
    assert all(name.startswith("projector.") for name in account["left_over"])


@pytest.mark.parametrize(
    ("layers", "backbone", "message"),
    [
        (34, "resnet18", r"parts that the backbone lacks, such as layer\d"),
        (18, "resnet34", "lacks layer"),
        (50, "resnet18", r"parts that the backbone lacks|is \(\d+"),
        (18, "resnet50", "lacks"),
    ],
)
def test_weights_of_another_depth_are_refused(
    layers: int, backbone: str, message: str, tmp_path: Path, tiny_recipe: dict[str, Any]
) -> None:
    torch.save({"state_dict": prefixed("module.", theirs(layers))}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        build.model.network(
            recipe_from(tiny_recipe, weights=str(tmp_path / "weights.pth"), backbone=backbone),
            in_channels=3,
            device=torch.device("cpu"),
        )


def test_a_file_without_the_backbone_names_what_both_hold(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    torch.save({"decoder.0.kernel": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds decoder\.0\.kernel; the backbone's are bn1\.bias"):
        build.model.network(
            recipe_from(tiny_recipe, weights=str(tmp_path / "weights.pth")), in_channels=3, device=torch.device("cpu")
        )


@pytest.mark.parametrize(
    "name", ["torchvision/convnext_tiny", "torchvision/vit_b_16", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]
)
def test_a_librarys_whole_model_fits_its_backbone(name: str) -> None:
    library, _, model = name.partition("/")
    arguments = {"image_size": 32} if "vit_b" in name else {"img_size": 32} if "vit" in name else {}
    whole = hub.create(library, model, arguments).state_dict()
    network = backbones.backbone(name, stem="imagenet", side_px=32)
    account = starting_weights.load_pretrained(network, {"model": prefixed("module.", whole)}, origin="x")
    assert account.absent == ()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in network.state_dict().items())
    assert {key.rpartition(".")[2] for key in account.left_over} == {"weight", "bias"}


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
