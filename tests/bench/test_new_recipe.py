"""`fastssl recipe`: new recipes fit data, device and minutes; shown ones are whole; the schema agrees with load."""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import torch
import yaml

import fastssl
from fastssl import build
from fastssl.bench import dry_run, new_recipe
from fastssl.errors import UserError
from fastssl.recipe.json_schema import json_schema
from fastssl.recipe.load import load, shipped
from fastssl.recipe.presets import view_table

RATE = 100.0  # images a second, in place of a measurement


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "images_per_second", lambda recipe, channels: RATE)


def beton(folder: Path, count: int, side_px: int, *, channels: int = 3, classes: int = 0) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, side_px, side_px, channels), np.uint8)
    labels = {"labels": np.arange(count) % classes} if classes else {}
    np.savez(folder / "images.npz", images=images, **labels)
    fastssl.convert(folder / "images.npz", folder / "images.beton", channels=channels)
    return folder / "images.beton"


@pytest.mark.usefixtures("rate")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("count", "side_px", "channels", "classes"), [(2, 8, 3, 0), (90, 28, 1, 3), (24, 150, 4, 1), (40, 64, 3, 2)]
)
def test_a_new_recipe_fits_its_data(
    tmp_path: Path, device: new_recipe.Device, count: int, side_px: int, channels: int, classes: int
) -> None:
    path = beton(tmp_path, count, side_px, channels=channels, classes=classes)
    text = new_recipe.new_recipe(path, device=device)
    assert all(len(line) < 120 for line in text.splitlines() if "path:" not in line)
    recipe = load(yaml.safe_load(text))
    assert recipe.device == device
    assert recipe.data.path == path
    assert recipe.augment.side_px <= side_px
    assert recipe.evaluate.side_px is not None
    assert recipe.augment.side_px <= recipe.evaluate.side_px <= side_px
    assert recipe.data.val_count == (count // 10 if classes > 1 else 0)
    assert all(row.jitter_p == row.gray_p == 0 for row in view_table(recipe.augment)) == (channels != 3)
    (source,) = re.findall(r"Source: the shipped (\w+\.yaml)", text)
    shipped = load(source)
    weights = {"redundancy_weight", "invariance_weight", "variance_weight", "covariance_weight"}
    ours, theirs = (one.loss.model_dump(exclude=weights) for one in (recipe, shipped))
    assert ours == theirs
    for section, name in (("train", "compile"), ("train", "cuda_graph"), ("train", "precision"), ("optim", "name")):
        assert getattr(getattr(recipe, section), name) == getattr(getattr(shipped, section), name)
    if device == "cpu":
        described = dry_run.describe(recipe)
        assert described["steps_per_epoch"] >= 1
        assert described["idle_color"] is None


@pytest.mark.usefixtures("rate")
def test_epochs_follow_from_the_minutes(tmp_path: Path) -> None:
    path = beton(tmp_path, 100, 8, classes=2)
    for minutes, epochs in ((0.001, 1), (3, 200), (1e6, new_recipe.MAX_EPOCHS)):
        recipe = load(yaml.safe_load(new_recipe.new_recipe(path, device="cpu", minutes=minutes)))
        assert recipe.train.epochs == epochs  # minutes * 60 * RATE / 90 images
        assert recipe.optim.warmup_epochs <= epochs / 5
    for minutes in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match="minutes is"):
            new_recipe.new_recipe(path, minutes=minutes)


@pytest.mark.usefixtures("rate")
@pytest.mark.parametrize(
    ("backbone", "stem"),
    [("resnet18", "patch2"), ("torchvision/mobilenet_v3_small", "patch2"), ("timm/vit_tiny_patch16_224", "patch2")],
)
def test_a_backbone_of_ones_choice_gets_a_stem_that_it_takes(
    tmp_path: Path, backbone: str, stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    beton(tmp_path, 20, 44)
    record = new_recipe.write_new("images.beton", "my own.yaml", device="cpu", backbone=backbone)
    assert record["hub"]
    recipe = load("my own.yaml")
    assert (recipe.model.backbone, recipe.model.stem) == (backbone, stem)
    assert build.model.network(recipe, in_channels=3, device=torch.device("cpu"))
    assert "# Train: fastssl train 'my own.yaml'" in Path("my own.yaml").read_text().splitlines()
    with pytest.raises(UserError, match="resnet19"):
        new_recipe.new_recipe("images.beton", backbone="resnet19")
    with pytest.raises(UserError, match=r"vit_b_16 takes no views of 32 px"):
        new_recipe.new_recipe("images.beton", device="cpu", backbone="torchvision/vit_b_16")


def test_what_is_no_data_file_is_told_how_to_become_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as printed:
        new_recipe.new_recipe(tmp_path)
    assert "fastssl convert" in printed.value.fix
    with pytest.raises(UserError):
        new_recipe.new_recipe(tmp_path / "absent.beton")


def fastssl_recipe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return command.fastssl("recipe", *words, cwd=folder)


def test_the_command_writes_once_and_names_the_schema_beside_it(tmp_path: Path) -> None:
    path = beton(tmp_path, 40, 16, classes=2)
    done = fastssl_recipe(tmp_path, "new", str(path), "--out", "my.yaml", "--minutes", "0.01", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert load(tmp_path / "my.yaml").train.epochs == record["epochs"] >= 1
    first = (tmp_path / "my.yaml").read_text().splitlines()[0]
    assert json.loads((tmp_path / first.partition("$schema=")[2]).read_text()) == json_schema()
    before = (tmp_path / "my.yaml").read_text()
    again = fastssl_recipe(tmp_path, "new", str(path), "--out", "my.yaml")
    assert again.returncode == 2
    assert "my.yaml is there already" in again.stderr
    assert (tmp_path / "my.yaml").read_text() == before


def test_shown_recipes_are_whole_and_load_again(tmp_path: Path, finished_run: Path) -> None:
    done = fastssl_recipe(tmp_path, "show", "quickstart", "-s", "seed=5")
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert load(tmp_path / "again.yaml") == load("quickstart", ["seed=5"])
    assert "# view 4: side_px 24" in done.stdout
    done = fastssl_recipe(tmp_path, "show", str(finished_run), "--json")
    record = json.loads(done.stdout.splitlines()[-1])
    assert load(record["recipe"]) == load(finished_run / "recipe.yaml")
    assert len(record["views"]) == 2
    assert fastssl_recipe(tmp_path, "show", "absent").returncode == 2


MISTAKES: tuple[dict[str, Any], ...] = (
    {"data": {"path": "a.beton", "batchsize": 3}},
    {"data": {}},
    {"train": {"epochs": 0}},
    {"augment": {"all": {"hflip": 1}}},
    {"augment": {"rows": [{"side_px": 0}, {}]}},
    {"loss": {"name": "vicreg", "form": "exact"}},
    {"optim": {"lr": -1}},
)


def test_the_schema_takes_what_load_takes_and_refuses_what_it_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    check.check_schema(json_schema())
    for path in shipped():
        assert not list(check.iter_errors(yaml.safe_load(path.read_text()))), path
        assert not list(check.iter_errors(load(path).model_dump(mode="json"))), path
    good = {"data": {"path": "a.beton"}, "train": {"epochs": 1}, "loss": {"redundancy_weight": 0.1}}
    assert check.is_valid(good)
    for wrong in MISTAKES:
        assert not check.is_valid(good | wrong), wrong
        with pytest.raises(UserError):
            load(good | wrong)


def test_the_command_says_what_it_wrote_and_where_the_backbone_cannot_go(tmp_path: Path) -> None:
    done = fastssl_recipe(
        tmp_path, "new", str(beton(tmp_path, 40, 16, classes=2)), "--out", "my.yaml", "--minutes=0.001"
    )
    assert "recipe.schema.json: the schema" in done.stdout
    assert "Not for torchvision or timm: resnet_compact" in done.stdout
    assert "(s)" not in done.stdout
