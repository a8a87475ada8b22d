"""What `duplicates` left in a run stands on its report: pairs and outliers with pictures, and damage is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastssl.errors import UserError
from fastssl.pretrained.duplicates import duplicates
from fastssl.report import duplicates as shown
from fastssl.report import inputs, report
from fastssl.report.inputs import LabeledRun

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> LabeledRun:
    """A copy of a run, with the near-duplicates of sixty shapes."""
    folder = tmp_path_factory.mktemp("twins") / "run"
    shutil.copytree(tiny_run, folder)
    record = duplicates(folder, "shapes", threshold=0.5, most=20, count=60, device="cpu")
    assert record["kept"] == str(folder / "duplicates.json")
    return inputs.read_inputs([folder])[0][0]


def test_the_page_shows_pairs_and_outliers(run: LabeledRun, tmp_path: Path) -> None:
    result = report([run.folder], tmp_path / "out", images=20)
    page = Path(result["page"]).read_text()
    record = json.loads((run.folder / "duplicates.json").read_text())
    for name in ("duplicates", "outliers"):
        card = page.partition(f'id="{run.slug}-{name}"')[2].partition("</figure>")[0]
        assert card.count("<li><img ") == 16, name
        assert (tmp_path / "out" / f"{run.slug}-{name}.png").is_file()
    first = record["pairs"][0]
    assert f'alt="{first["image"]} and {first["other"]}"' in page
    assert f'data-head="cosine">{first["similarity"]:.3f}</td>' in page
    assert {"All 20 pairs", "All 20 outliers"} <= set(re.findall("<summary>(.*?)</summary>", page))
    assert (
        f"pairs of 60 images of shapes with a cosine of 0.5 or more, by the features of this run, step {record['step']}"
        in page
    )


def test_names_are_text_and_images_without_a_picture_are_rows(run: LabeledRun) -> None:
    name = "<script>x</script>.jpg"
    record = {"source": "a<b", "images": 2, "threshold": 0.9, "pairs": [], "outliers": []}
    record |= {"pairs": [{"image": name, "other": "b.jpg", "similarity": 0.99}]}
    record |= {"pictures": dict.fromkeys((name, "b.jpg"), any_picture(run))}
    section = shown.section(run, record, Path("duplicates.json"))
    assert "<script" not in section.figures[0].body
    assert section.tables[0].rows == [["1", name, "b.jpg", "0.990"]]
    assert shown.section(run, record | {"pictures": {}}, Path("duplicates.json")).figures == []
    assert shown.section(run, record | {"pairs": []}, Path("duplicates.json")).intro.startswith("No pair of 2 images")


def any_picture(run: LabeledRun) -> str:
    pictures: dict[str, str] = json.loads((run.folder / "duplicates.json").read_text())["pictures"]
    return next(iter(pictures.values()))


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": None},
        {"pairs": [{"image": "a"}]},
        {"outliers": [{"image": "a", "similarity": "x"}]},
        {"images": "many"},
        {"pictures": {"a": "no base64"}},
        {"pictures": {"a": "QUJD"}},
        {"pictures": [1]},
        {"pictures": {"a": 7}},
    ],
)
def test_a_damaged_file_is_refused_by_name(run: LabeledRun, change: dict[str, Any]) -> None:
    path = run.folder / "duplicates.json"
    with pytest.raises(UserError, match=r"duplicates\.json is damaged"):
        shown.section(run, json.loads(path.read_text()) | change, path)


def test_a_run_without_the_file_has_no_such_section(tiny_run: Path) -> None:
    assert shown.sections(inputs.read_inputs([tiny_run])[0][0]) == []
