"""`duplicates`: copies of an image are found by name, and the table holds what the record says."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.errors import UserError
from fastssl.pretrained.duplicates import duplicates


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
    record = duplicates(tiny_run, photos, table, threshold=0.9, device="cpu")
    assert record["images"] == 13
    assert {Path(record["pairs"][0][key]).name for key in ("image", "other")} == {"03.png", "copy of 03.jpg"}
    assert record["pairs"][0]["similarity"] > 0.98
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["pair"] * len(record["pairs"]) + ["outlier"] * len(record["outliers"])
    assert rows[0]["image"] == record["pairs"][0]["image"]


@pytest.mark.parametrize(
    ("options", "named"), [({"threshold": 2.0}, "threshold"), ({"most": 0}, "most"), ({"out": "a.txt"}, "suffix")]
)
def test_mistakes_name_the_argument(tiny_run: Path, photos: Path, options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        duplicates(tiny_run, photos, device="cpu", **options)
