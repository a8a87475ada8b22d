"""A newcomer's path with own images, as real processes: convert, recipe new, train, eval, export, embed.

And a whole afternoon with 600 photos: at a terminal of 80 columns with every printed line pasted back, and in Python.
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
from PIL import Image
from terminal import COLUMNS, commands, pasted

CLASSES = ("dark", "light")
TINY = ("train.epochs=2", "model.width=0.25", "model.projector=[16]", "evaluate.linear_epochs=2", "data.batch_size=16")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """64 images of two classes: PNG, JPEG and WebP, in color, gray, with a palette or transparency, of 20 to 60 px."""
    generator = np.random.default_rng(0)
    kinds = [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg"), ("L", "jpg"), ("RGB", "webp")]
    for number in range(64):
        name, (mode, suffix) = CLASSES[number % 2], kinds[number % len(kinds)]
        height, width = generator.integers(20, 61, 2)
        pixels = generator.integers(0, 100, (height, width, 3)) + 150 * (number % 2)
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{number:02d}.{suffix}")
    return tmp_path / "photos"


def fastssl(folder: Path, *words: str) -> dict[str, Any]:
    done = command.fastssl(*words, "--json", cwd=folder)
    assert done.returncode == 0, (words, done.stderr)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def test_from_a_folder_of_photos_to_features(photos: Path, tmp_path: Path) -> None:
    manifest = fastssl(tmp_path, "convert", "photos", "data/photos.beton", "--side-px", "32")
    assert (manifest["count"], manifest["classes"], manifest["side_px"]) == (64, list(CLASSES), 32)

    chosen = fastssl(tmp_path, "recipe", "new", "data/photos.beton", "--out", "my.yaml", "--minutes", "0.01")
    assert (chosen["val_count"], chosen["view_side_px"]) == (6, 24)

    changes = [word for change in TINY for word in ("-s", change)]
    summary = fastssl(tmp_path, "train", "my.yaml", *changes)
    assert summary["run_dir"] == "runs/my"
    assert summary["validation"]["knn5_pct"] >= 50.0

    judged = fastssl(tmp_path, "eval", "runs/my", "--on", "val", "--probe", "knn")
    assert judged["rows"]

    fastssl(tmp_path, "export", "runs/my", "--to", "safetensors", "--out", "backbone.safetensors")
    embedded = fastssl(tmp_path, "embed", "runs/my", "photos", "--out", "features.npy")
    assert embedded["count"] == 64
    fastssl(tmp_path, "embed", "backbone.safetensors", "photos", "--out", "exported.npy")
    features_NF = np.load(tmp_path / "features.npy")
    assert features_NF.shape == (64, embedded["features_dim"])
    np.testing.assert_allclose(np.load(tmp_path / "exported.npy"), features_NF, rtol=1e-4, atol=1e-5)
    with open(tmp_path / "features.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["id"]).name for row in rows} == {path.name for path in photos.rglob("*.*")}
    assert all(row["class"] in row["id"] for row in rows)


@pytest.fixture
def afternoon(tmp_path: Path) -> Path:
    """A folder with 600 photos without labels in `my photos`: mixed sizes, four colors of stripes, JPEG and PNG."""
    generator = np.random.default_rng(1)
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in range(600):
        height, width = generator.integers(24, 65, 2)
        y, x = np.mgrid[0:height, 0:width]
        stripes = np.sin((x if number % 2 else y) / (1 + number % 4) + generator.uniform(0, 6))
        pixels = (
            120 + 60 * stripes[:, :, None] * generator.uniform(0.3, 1, 3) + generator.normal(0, 15, (height, width, 3))
        )
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"photo {number:03d}.{'jpg' if number % 3 else 'png'}")
    return tmp_path


def test_an_afternoon_in_a_terminal_with_every_printed_line_pasted_back(afternoon: Path) -> None:
    shown = pasted("fastssl convert 'my photos' 'data/my photos.beton' --side-px 16", afternoon)
    assert "data/my photos.beton: 600 images" in shown
    (new,) = commands(shown)
    shown = pasted(f"{new} --minutes 0.01", afternoon)
    assert "recipe.schema.json: the schema" in shown
    dry_run, train = commands(shown)
    text = pasted(dry_run, afternoon)
    assert text.index("estimate:") < text.index("batch_size:"), "what the run would be comes before its recipe"
    shown = pasted(train, afternoon)
    assert max(len(line) for line in re.split(r"[\r\n]+", shown) if "━" in line) <= COLUMNS
    judge, look, take = commands(shown)

    shown = pasted(judge, afternoon)
    assert "On pretraining images without labels: n = 600" in shown
    assert "participation ratio" in shown
    pasted(look, afternoon)
    assert (afternoon / "report" / "index.html").is_file()
    shown = pasted(take, afternoon)
    record = json.loads((afternoon / "my photos.pt2.json").read_text())
    lines = shown.partition("In Python:\n")[2].splitlines()
    assert not any("fastssl" in line for line in lines), "what was exported needs plain PyTorch alone"
    code = [*lines, *prepared_like(record, "my photos/photo 001.jpg"), "print(features.shape, both.shape)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=afternoon, capture_output=True, text=True, timeout=300
    )
    dim = record["features_dim"]
    assert done.stdout == f"torch.Size([1, {dim}]) torch.Size([1, {dim}])\n", done.stderr


def prepared_like(record: dict[str, Any], path: str) -> list[str]:
    """The record's own lines from a file to features."""
    return [f"path = {path!r}", *record["preprocessing"]["code"], "both = model(torch.from_numpy(images))"]


def test_an_afternoon_in_python(afternoon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import fastssl
    from fastssl.bench.new_recipe import write_new
    from fastssl.pretrained.evaluation.evaluate import evaluate
    from fastssl.pretrained.export.export import export
    from fastssl.report import report

    monkeypatch.chdir(afternoon)
    manifest = fastssl.convert("my photos", "data/my photos.beton", side_px=16)
    assert (manifest.count, manifest.unlabeled) == (600, 600)
    written = write_new("data/my photos.beton", "my photos.yaml", minutes=0.01)
    summary = fastssl.train(written["recipe"], progress=False)
    run = summary["run_dir"]
    figures = evaluate(run)["spectrum"]["backbone"]
    assert 1 <= figures["participation_ratio"] <= figures["dims"]
    assert Path(report([run], "report")["page"]).is_file()

    record = export(run, "photos.pt2", to="torch-export")
    names: dict[str, Any] = {}
    exec("\n".join([*record["loading"], *prepared_like(record, "my photos/photo 001.jpg")]), names)
    features_NF = fastssl.load(run, device="cpu").embed(["my photos/photo 001.jpg"])
    torch.testing.assert_close(names["both"].detach().numpy(), features_NF, rtol=0.05, atol=0.05 * features_NF.max())
