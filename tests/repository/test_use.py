"""docs/use.md: its Python runs; images of one and four channels go the whole way."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastssl
from fastssl.errors import UserError
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.export.export import export

DOCS = Path(__file__).resolve().parents[2] / "docs"


def snippet(name: str, page: str = "use.md") -> str:
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found, name
    return found[1]


def test_nearest_neighbors_in_ten_lines(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    embed(tiny_run, "shapes", tmp_path / "features.npy", count=40)
    code = [sys.executable, "-c", snippet("neighbors")]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
    assert done.stdout.startswith("shapes[0] -> [")


def test_fine_tuning_changes_the_backbone_and_saves_the_network(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet("finetune", "finetuning.md").replace("runs/quickstart", str(tiny_run)), names)
    saved = torch.load("finetuned.pth")
    before = fastssl.load(tiny_run, device="cpu").backbone.state_dict()
    changed = [name for name, weight in before.items() if not torch.equal(weight, saved[f"0.{name}"])]
    assert changed
    assert saved["1.weight"].shape == (10, fastssl.load(tiny_run).features_dim)


def test_own_backbone_loss_and_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet("own"), names)
    assert names["summary"]["views"] == 2 * 256
    assert names["features"].embed(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 32)
    recipe = names["features"].recipe
    assert (recipe.model.backbone, recipe.augment.rows[1]["brightness"]) == ("custom", 0.4)
    with pytest.raises(UserError, match="backbone of its own"):
        fastssl.load("runs/own")


def test_baselines_leave_out_an_untrained_backbone_that_cannot_be_named(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    own = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    recipe = tiny_recipe | {"train": {"epochs": 1}, "evaluate": {"linear_epochs": 0, "knn_k": [5], "baselines": True}}
    summary = fastssl.train(recipe, run_dir=tmp_path / "run", backbone=own)
    assert 0 <= summary["raw_pixel_knn5_pct"] <= 100
    assert not [name for name in summary if name.startswith("untrained")]


def test_the_untrained_baseline_does_not_start_from_weights(
    tiny_run: Path, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    short = {
        "train": tiny_recipe["train"] | {"epochs": 1},
        "evaluate": {"linear_epochs": 0, "knn_k": [5], "baselines": True},
    }
    started = tiny_recipe["model"] | {"weights": str(tiny_run)}
    scratch = fastssl.train(tiny_recipe | short, run_dir=tmp_path / "scratch")
    tuned = fastssl.train(tiny_recipe | short | {"model": started}, run_dir=tmp_path / "tuned")
    assert tuned["untrained_knn5_pct"] == scratch["untrained_knn5_pct"]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_go_the_whole_way(channels: int, tmp_path: Path) -> None:
    """Convert, train, embed, export; gray ones from a folder of color files, four channels from an array."""
    generator = np.random.default_rng(0)
    if channels == 4:
        np.save(tmp_path / "images.npy", generator.integers(0, 256, (48, 16, 16, 4), np.uint8))
        source = tmp_path / "images.npy"
    else:
        source = tmp_path / "images"
        source.mkdir()
        for i in range(48):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(source / f"{i:02d}.png")
    fastssl.convert(source, tmp_path / "images.beton", side_px=16, channels=channels)
    recipe = {
        "name": "channels",
        "device": "cpu",
        "data": {"path": str(tmp_path / "images.beton"), "batch_size": 16},
        "augment": {"side_px": 16, "all": {"solarize_p": 0.5, "blur_p": 0.5}},
        "model": {"backbone": "resnet18", "stem": "patch2", "width": 0.125, "projector": [8]},
        "train": {"epochs": 1, "precision": "fp32"},
    }
    observed: list[dict[str, Any]] = []
    fastssl.train(recipe, run_dir=tmp_path / "run", observe=observed.append)
    warned = [record["message"] for record in observed if record["event"] == "warning"]
    assert [text for text in warned if f"the images have {channels}" in text and "jitter_p: 0, gray_p: 0" in text]
    embed(tmp_path / "run", source, tmp_path / "direct.npy")
    export(tmp_path / "run", tmp_path / "backbone.safetensors", to="safetensors")
    embed(tmp_path / "backbone.safetensors", tmp_path / "images.beton", tmp_path / "exported.npy")
    direct_NF = np.load(tmp_path / "direct.npy")
    assert direct_NF.shape == (48, 64)
    np.testing.assert_allclose(np.load(tmp_path / "exported.npy"), direct_NF, rtol=1e-4, atol=1e-5)
