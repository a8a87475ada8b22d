"""What is exported gives our features elsewhere: in torchvision, timm, ONNX, torch.export and from safetensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import pytest
import torch
from safetensors import safe_open

import fastssl
from fastssl import build
from fastssl.data.manifest import Manifest
from fastssl.errors import UserError
from fastssl.pretrained.export.export import export
from fastssl.pretrained.export.record import is_accuracy
from fastssl.pretrained.export.use import use_lines
from fastssl.pretrained.load import Pretrained
from fastssl.recipe.load import load
from fastssl.runs import checkpoint, reading


def network(channels: int = 3, **model: Any) -> Pretrained:
    """An untrained network with lively batch statistics, as `load` would give it."""
    recipe = load(
        {
            "name": "untrained",
            "device": "cpu",
            "data": {"path": "none.beton"},
            "augment": {"side_px": 32},
            "model": {"projector": [8]} | model,
            "train": {"epochs": 1},
        }
    )
    manifest = Manifest(
        count=1,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        side_px=32,
        digest="sha256:0",
        classes=(),
        options={"side_px": 32},
    )
    device = torch.device("cpu")
    backbone = build.model.network(recipe, in_channels=channels, device=device).backbone
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.uniform_(buffer, -0.1, 0.1)
    return Pretrained(
        backbone=backbone.eval(),
        recipe=recipe,
        device=device,
        clean=build.views.clean_view(recipe, manifest, device=device),
        projector=None,
        manifest=manifest,
        digest="0",
        run_dir=None,
    )


RESNET18 = {"backbone": "resnet18", "stem": "imagenet"}
CIFAR18 = {"backbone": "resnet18", "stem": "cifar"}
RESNET50 = {"backbone": "resnet50", "stem": "imagenet"}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "stem": "patch8"}
POOL = {"backbone": "resnet_pool", "stem": "patch2"}
COMPACT = POOL | {"backbone": "resnet_compact"}
CONVNEXT4 = {"backbone": "timm/convnext_atto", "channels": 4}
CONVNEXT4_TV = {"backbone": "torchvision/convnext_tiny", "channels": 4}
TRIPS = [
    ("torchvision", ".safetensors", RESNET18),
    ("torchvision", ".pth", CIFAR18 | {"channels": 1}),
    ("torchvision", ".pth", CONVNEXT4_TV),
    ("timm", ".safetensors", RESNET18),
    ("timm", ".pth", RESNET50),
    ("timm", ".safetensors", CIFAR18),
    ("timm", ".safetensors", VIT),
    ("timm", ".safetensors", CONVNEXT4),
    ("safetensors", ".safetensors", RESNET18),
    ("safetensors", ".safetensors", CONVNEXT4),
    ("torch-export", ".pt2", RESNET18),
    ("torch-export", ".pt2", VIT),
    ("onnx", ".onnx", RESNET18),
    ("torch-export", ".pt2", POOL),
    ("torch-export", ".pt2", COMPACT),
    ("onnx", ".onnx", COMPACT),
    ("onnx", ".onnx", POOL | {"stem": "patch8", "width": 0.5}),  # 4 pixels a side, then 2 and 1
    ("onnx", ".onnx", VIT),
    ("onnx", ".onnx", CONVNEXT4),
    ("huggingface", "", VIT),
    ("huggingface", "", CONVNEXT4),
    ("huggingface", "", CIFAR18),
]


@pytest.mark.parametrize(
    ("to", "suffix", "model"), TRIPS, ids=[f"{t}-{m['backbone']}-{i}" for i, (t, _, m) in enumerate(TRIPS)]
)
def test_the_printed_lines_load_what_was_exported_and_give_our_features(
    to: Any, suffix: str, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "timm" in (to, model["backbone"].partition("/")[0]) or to == "huggingface":
        pytest.importorskip("timm")
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    net = network(**model)
    path = tmp_path / f"my exported{suffix}"
    record = export(net, path, to=to)
    images = torch.randn(5, net.manifest.channels, 32, 32)
    names: dict[str, Any] = {"images": images.numpy()}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(record["loading"]), names)
    if to == "onnx":
        theirs = torch.from_numpy(names["features"])
    else:
        module = names.get("model", names.get("backbone"))
        theirs = (module if to == "torch-export" else module.eval())(images).detach()
    ours = net.backbone(images).detach()
    assert ours.std() > 0.01 * ours.abs().mean()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    monkeypatch.chdir(tmp_path.parent)
    printed: dict[str, Any] = {}
    exec("\n".join(use_lines(record, Path(tmp_path.name) / path.name)), printed)
    assert tuple(printed["features"].shape) == (1, ours.shape[1])


def test_every_export_carries_preprocessing_license_recipe_accuracy_and_digest(tiny_run: Path, tmp_path: Path) -> None:
    record = export(tiny_run, tmp_path / "b.safetensors", to="safetensors")
    assert json.loads((tmp_path / "b.safetensors.json").read_text()) == record
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["fastssl"]) == record
    data = json.loads((tiny_run / "data.json").read_text())
    prepared = record["preprocessing"]
    assert (prepared["side_px"], prepared["mean"], prepared["interpolation"]) == (16, data["mean"], "bicubic")
    assert record["data"]["digest"] == data["digest"]
    assert record["recipe"]["model"]["width"] == 0.25
    assert "validation_knn5_pct" in record["accuracy"]
    assert "MIT" in record["license"]


def test_an_accuracy_is_that_of_the_exported_weights(finished_run: Path, tmp_path: Path) -> None:
    """Step 10 of 10 was measured on the test set, step 5 on held-out images alone."""
    evaluations = {int(record["step"]): record for record in reading.read(finished_run).evaluations}
    summary = reading.read(finished_run).summary
    for step, expected in (
        (5, {f"validation_{key}": value for key, value in evaluations[5].items() if is_accuracy(key)}),
        (10, {key: value for key, value in summary.items() if is_accuracy(key)}),
    ):
        net = fastssl.load(checkpoint.path_of(finished_run / "checkpoints", step), device="cpu")
        assert export(net, tmp_path / f"{step}.safetensors", to="safetensors")["accuracy"] == expected != {}
    unmeasured = export(replace(net, step=7), tmp_path / "folder", to="huggingface")
    assert unmeasured["accuracy"] == {}
    assert "No accuracy is recorded for these weights." in (tmp_path / "folder" / "README.md").read_text()


def test_exported_weights_embed_and_export_again_like_the_run(tiny_run: Path, tmp_path: Path) -> None:
    import numpy as np

    export(tiny_run, tmp_path / "b.safetensors", to="safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "folder", to="huggingface")
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for path in (tmp_path / "b.safetensors", tmp_path / "folder"):
        np.testing.assert_array_equal(fastssl.load(path).embed(images), fastssl.load(tiny_run).embed(images))
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {
        "README.md", "config.json", "fastssl.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h_NF: torch.Tensor = self.other(self.one(self.stem(x).mean((2, 3))))
        return h_NF


def test_tied_weights_are_exported(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    fastssl.train(tiny_recipe | {"model": {"projector": [8]}}, run_dir=tmp_path / "run", backbone=Tied())
    net = fastssl.load(tmp_path / "run", backbone=Tied(), device="cpu")
    export(net, tmp_path / "tied.safetensors", to="safetensors")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(tensors["one.weight"], tensors["other.weight"])
    assert torch.equal(tensors["one.weight"], net.backbone.state_dict()["one.weight"])


@pytest.mark.parametrize(("to", "out"), [("torchvision", "a.pth"), ("timm", "a.pth")])
def test_a_network_of_our_own_is_refused_with_the_reason(tiny_run: Path, tmp_path: Path, to: Any, out: str) -> None:
    with pytest.raises(UserError, match=r"resnet_tiny of width 0\.25"):
        export(tiny_run, tmp_path / out, to=to)
    with pytest.raises(UserError, match="suffix"):
        export(tiny_run, tmp_path / "a.txt", to=to)
    assert not list(tmp_path.iterdir())


def test_the_reason_for_changing_the_hub_model_is_given(tmp_path: Path) -> None:
    record = export(network(**CIFAR18), tmp_path / "a.pth", to="torchvision")
    assert "conv1" in record["changes"]
    assert any("nn.Conv2d(3, 64, kernel_size=(3, 3)" in line for line in record["loading"])
    assert "none" in export(network(**RESNET18), tmp_path / "b.pth", to="torchvision")["changes"]


def test_without_onnxruntime_the_extra_is_named(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(UserError, match=r"not installed: onnxruntime(.|\n)*fastssl-vision\[onnx\]"):
        export(tiny_run, tmp_path / "a.onnx", to="onnx")


def test_the_command_prints_the_lines_that_load(tiny_run: Path, tmp_path: Path) -> None:
    words = ["export", str(tiny_run), "--to", "safetensors", "--out", str(tmp_path / "b.safetensors"), "--json"]
    done = command.fastssl(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["loading"][0] == "import fastssl"
