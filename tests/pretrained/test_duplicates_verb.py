"""`duplicates`: copies of an image are found by name, the table holds what the record says, and the run keeps it."""

import base64
import csv
import io
import json
import os
import shutil
from pathlib import Path

import command
import numpy as np
import pytest
from PIL import Image

from fastssl.errors import UserError
from fastssl.pretrained.duplicates import duplicates
from fastssl.report import report


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "photos", np.random.default_rng(1)
    folder.mkdir()
    for i in range(12):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((24, 24), Image.Resampling.NEAREST)
        image.save(folder / f"{i:02d}.png")
        if i == 3:
            image.save(folder / "copy of 03.jpg", quality=100, subsampling=0)
    return folder


def test_a_copy_in_another_format_is_the_first_pair(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "twins.csv"
    record = duplicates(shutil.copytree(tiny_run, tmp_path / "run"), photos, table, threshold=0.9, device="cpu")
    assert record["images"] == 13
    assert {Path(record["pairs"][0][key]).name for key in ("image", "other")} == {"03.png", "copy of 03.jpg"}
    assert record["pairs"][0]["similarity"] > 0.98
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["pair"] * len(record["pairs"]) + ["outlier"] * len(record["outliers"])
    assert rows[0]["image"] == record["pairs"][0]["image"]


@pytest.mark.parametrize("kind", ["folder", "tar", "skipping"])
def test_the_run_keeps_the_result_with_pictures_of_its_images(
    tiny_run: Path, photos: Path, tmp_path: Path, kind: str
) -> None:
    """Pictures are those of the images named, whether items are read by position or in a stream."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    source = photos
    if kind == "tar":
        source = Path(shutil.make_archive(str(tmp_path / "photos"), "tar", photos))
    if kind == "skipping":
        (photos / "00 broken.png").write_bytes(b"no image")
    record = duplicates(run, source, threshold=-1.0, most=100, device="cpu", on_error="skip")
    written = json.loads((run / "duplicates.json").read_text())
    assert record.pop("kept") == str(run / "duplicates.json")
    pictures = written.pop("pictures")
    assert written == record
    assert {pair["image"] for pair in record["pairs"][:16]} <= set(pictures)
    assert {outlier["image"] for outlier in record["outliers"][:16]} <= set(pictures)
    originals = {path.name: pixels(path) for path in photos.iterdir() if "broken" not in path.name}
    for name, data in pictures.items():
        shown = pixels(io.BytesIO(base64.b64decode(data)))
        distances = {other: np.abs(shown - original).mean() for other, original in originals.items()}
        nearest = min(distances, key=lambda other: distances[other])
        assert nearest.removeprefix("copy of ")[:2] == Path(name).name.removeprefix("copy of ")[:2]


def test_names_in_latin_1_are_compared_kept_and_printed(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    run, name = shutil.copytree(tiny_run, tmp_path / "run"), b"caf\xe9.png"
    (photos / "03.png").rename(photos / os.fsdecode(name))
    words = ["duplicates", str(run), "photos", "--out", "twins.csv", "--device", "cpu"]
    strict = "import sys; sys.stdout.reconfigure(errors='strict')"  # as Python has it in most locales
    started = command.start(*words, cwd=tmp_path, before=strict)
    printed, errors = started.communicate(300)
    assert started.returncode == 0, errors
    assert name in printed
    assert name in (tmp_path / "twins.csv").read_bytes()
    assert os.fsdecode(name) in json.loads((run / "duplicates.json").read_text())["pictures"]
    pytest.importorskip("matplotlib")
    assert "caf" in Path(report([run], tmp_path / "page")["page"]).read_text()


def pixels(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), float)


def test_a_table_that_cannot_be_written_is_refused_before_any_work(
    tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    seen: list[int] = []
    with pytest.raises(UserError, match=r"twins\.csv cannot be written"):
        duplicates(tiny_run, photos, tmp_path / "file" / "twins.csv", progress=lambda done, total: seen.append(done))
    assert not seen
    run, out = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "new" / "results" / "twins.csv"
    duplicates(run, photos, out, device="cpu")
    assert [path.name for path in out.parent.iterdir()] == ["twins.csv"]


def test_a_table_of_images_is_not_replaced_by_the_result(tiny_run: Path, photos: Path) -> None:
    table = photos / "photos.csv"
    table.write_text("path\n00.png\n01.png\n")
    with pytest.raises(UserError, match=r"photos\.csv is the source"):
        duplicates(tiny_run, table, photos / ".." / photos.name / "photos.csv", device="cpu")
    assert table.read_text() == "path\n00.png\n01.png\n"


def test_weights_outside_of_a_run_keep_nothing(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    import dataclasses

    import fastssl

    weights = dataclasses.replace(fastssl.load(tiny_run, device="cpu"), run_dir=None)
    record = duplicates(weights, photos)
    assert "kept" not in record
    assert "not_kept" not in record
    assert not (tiny_run / "duplicates.json").exists()


@pytest.mark.parametrize(
    ("options", "named"), [({"threshold": 2.0}, "threshold"), ({"most": 0}, "most"), ({"out": "a.txt"}, "suffix")]
)
def test_mistakes_name_the_argument(tiny_run: Path, photos: Path, options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        duplicates(tiny_run, photos, device="cpu", **options)
