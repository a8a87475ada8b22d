"""A newcomer's path with own images, as real processes: convert, recipe new, train, eval, export, embed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    command = [sys.executable, "-m", "fastssl", *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ})
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
