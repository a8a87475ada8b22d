"""What README and docs quote of the claims stands in the records of bench/results, figure by figure."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("claims*.json"))
PAGES = ("README.md", "docs/claims.md")
QUOTED = re.compile(r"\d+\.\d ± \d+\.\d %")


def told() -> set[str]:
    """Every mean and spread that a verdict tells."""
    texts = [said["text"] for path in RESULTS for said in json.loads(path.read_text())["verdicts"]]
    return {found for text in texts for found in QUOTED.findall(text)}


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_accuracy_of_the_claims_is_in_a_record(page):
    quoted = QUOTED.findall((ROOT / page).read_text(encoding="utf-8"))
    assert quoted, f"{page} quotes nothing of the claims"
    assert set(quoted) <= told()


@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "tta"), ("docs/claims.md", "tta"), ("README.md", "tta_peers")]
)
def test_every_quoted_time_to_accuracy_is_in_its_record(page, name):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["rows"]
    for row in (row for row in rows if row["metric"] == "train_s"):
        assert f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f})" in text, row["impl"]


def test_the_rates_of_augmentation_are_those_of_the_record():
    rows = json.loads((ROOT / "bench" / "results" / "augment.json").read_text())["rows"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = [("fastssl-cpu", 2), ("fastssl-cpu", 4), ("dali", 4), ("torchvision-v1", 4)]
    for side_px in (32, 224):
        for impl, views in wanted:
            work = {"side_px": side_px, "views": views, "blur": False}
            of = [r for r in rows if r["impl"] == impl and r["metric"] == "views_per_s"]
            (found,) = (r["median"] for r in of if work.items() <= r["work"].items())
            assert f"{found:,.0f}" in text, (impl, work)


def test_the_rates_of_loading_are_those_of_the_record():
    rows = json.loads((ROOT / "bench" / "results" / "loaders.json").read_text())["rows"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def rate(impl: str, **work: object) -> float:
        wanted = {"impl": impl, "metric": "images_per_s"}
        (found,) = (r for r in rows if wanted.items() <= r.items() and work.items() <= r["work"].items())
        return found["median"]

    padded = {"images": "cifar", "views": 1, "crop": "pad"}
    cut = [rate(impl, **padded) for impl in ("fastssl-resident", "ffcv", "ffcv-normalized")]
    cut += [rate(impl, images="photographs", views=4) for impl in ("fastssl-ffcv", "ffcv")]
    cut += [rate(impl, images="photographs", views=0) for impl in ("fastssl-ffcv", "ffcv")]
    assert [f"{value:,.0f}" for value in cut if f"{value:,.0f}" not in text] == []
    raw = [rate(impl, images="cifar", views=0) / 1e6 for impl in ("fastssl-ffcv", "ffcv")]
    assert "{:.2f} and {:.2f} million".format(*raw) in text


def test_the_verdicts_quoted_are_those_of_the_record():
    record = json.loads((ROOT / "bench" / "results" / "claims.json").read_text())
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d)\. .* \| (holds in part|holds|does not hold)", page, re.MULTILINE)
    assert rows == [(said["claim"][0], said["outcome"]) for said in record["verdicts"]]
