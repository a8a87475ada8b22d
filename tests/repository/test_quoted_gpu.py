"""The figures quoted from a GPU are those of their records."""

from typing import Any

import pytest
from test_quoted import page_text, record, row_of

PAGE = "docs/measured.md"


def words(page: str) -> str:
    return " ".join(page_text(page).split())


def evaluations(name: str) -> dict[str, list[dict[str, Any]]]:
    """Of each recipe's first seed, those of a stopped run too."""
    made = record(name)
    return {name: runs[0]["evaluations"] for name, runs in (made["curves"] | made.get("stopped", {})).items()}


@pytest.mark.parametrize(("name", "when"), [("gpu_resnet50", "then"), ("gpu_resnet50_muon", "now")])
def test_equal_seconds_of_resnet50(name: str, when: str):
    for recipe, curve in evaluations(name).items():
        end, views = curve[-1], 2 if recipe == "cifar10_baseline" else 4
        cells = [f"{end['train_s']:.1f}", f"{end['images'] * views:,}"]
        cells += [f"{end['ridge_pct']:.1f} %", f"{end['knn20_pct']:.1f} %"]
        assert row_of(PAGE, f"`{recipe}` {when}") == cells
        header = page_text(f"recipes/{recipe}.yaml")
        assert when == "then" or (f"{end['ridge_pct']:.1f}" in header and f"{end['knn20_pct']:.1f} %" in header)


def test_how_much_sooner_resnet50_learns():
    curves, text = evaluations("gpu_resnet50_muon"), words(PAGE)
    baseline, lowdim, muon = (curves[f"cifar10_{name}"] for name in ("baseline", "lowdim", "lowdim_muon"))
    first, best = lowdim[0], max(one["ridge_pct"] for one in baseline)
    below = max(one["train_s"] for one in baseline if one["ridge_pct"] < best)
    assert f"{first['ridge_pct']:.1f} % ridge in its first evaluation, after {first['train_s']:.1f} s" in text
    ratio = below / first["train_s"]
    assert f"less than its {best:.1f} % in every evaluation up to {below:.1f} s: at least {ratio:.1f} times" in text
    assert f"after {first['train_s']:.1f} s a better ridge accuracy ({first['ridge_pct']:.1f} %)" in words("README.md")
    assert f"within {baseline[-1]['train_s']:.0f} s ({best:.1f} %)" in words("README.md")
    end = muon[-1]
    with_muon = f"{end['ridge_pct']:.1f} % after {end['train_s']:.0f} s, kNN {end['knn20_pct']:.1f} %"
    assert f"with Muon {with_muon}" in words("README.md")
    last = lowdim[-1]
    sooner = next(one for one in muon if one["knn20_pct"] > last["knn20_pct"])
    assert sooner == next(one for one in muon if one["ridge_pct"] > last["ridge_pct"])
    assert f"within {last['train_s']:.1f} s ({last['knn20_pct']:.1f} %) after {sooner['train_s']:.1f} s" in text
    assert f"evaluation, {last['train_s'] / sooner['train_s']:.1f} times sooner" in text
    same_time = next(one for one in lowdim if one["train_s"] > 50)
    cells = f"{same_time['ridge_pct']:.1f} and {same_time['knn20_pct']:.1f} % after {same_time['train_s']:.1f} s"
    assert cells in text


def test_muon_over_an_epoch():
    rows = {(one["impl"], one["metric"]): one["median"] for one in record("gpu_epoch_muon")["rows"]}
    labels = {"as shipped": "Adam, rate 0.001", "muon, rate 0.01": "| Muon, rate 0.01 |"}
    labels["muon, rate 0.02"] = "| Muon, rate 0.02 |"
    lines = page_text(PAGE).splitlines()
    for impl, label in labels.items():
        shares = " | ".join(f"{rows[impl, metric]:.1f} %" for metric in ("knn20_pct", "ridge_pct"))
        wanted = f"| {shares} | {rows[impl, 'views_per_s']:,.0f} | {rows[impl, 'ms_per_step']:.1f} |"
        assert [line for line in lines if label in line and line.endswith(wanted)], impl
    header = page_text("recipes/cifar10_lowdim_muon.yaml")
    for rate in ("0.01", "0.02"):
        assert " and ".join(f"{rows[f'muon, rate {rate}', m]:.1f}" for m in ("ridge_pct", "knn20_pct")) in header
    old = {one["metric"]: one["median"] for one in record("gpu_epoch")["rows"] if one["impl"] == "authors' loss"}
    first = evaluations("gpu_resnet50_muon")["cifar10_lowdim"][0]
    three = [
        f"{rows['as shipped', metric]:.1f}, {old[metric]:.1f} and {first[metric]:.1f} %"
        for metric in ("knn20_pct", "ridge_pct")
    ]
    assert f"{three[0]} kNN and {three[1]} ridge after one epoch" in words(PAGE)


def test_the_views_of_the_cuda_kernels():
    rows = {one["impl"]: one for one in record("gpu_augment")["rows"] if one["metric"] == "views_per_s"}

    def millions(impl: str) -> str:
        least, most = (f"{rows[impl][key] / 1e6:.1f}" for key in ("min", "max"))
        return f"million views/s ({least} to {most})" if "cuda" in impl else f"million ({least} to {most})"

    for impl in ("fastssl-cuda", "torchvision-v2-batch"):
        assert f"{rows[impl]['median'] / 1e6:.1f} {millions(impl)}" in words(PAGE)
    kornia = rows["kornia"]
    assert f"cut {kornia['median']:,.0f} ({kornia['min']:,.0f} to {kornia['max']:,.0f})" in words(PAGE)


def test_the_tests_that_passed_on_a_gpu():
    counts = {one["metric"]: one["median"] for one in record("gpu_tests")["rows"]}
    assert counts["failed"] == 0
    assert (
        f"({counts['passed']:.0f}, commit {record('gpu_tests')['commit'][:7]}; {counts['skipped']:.0f} skipped"
        in words(PAGE)
    )


def test_the_epochs_on_the_gpu_are_those_of_their_record():
    rows = {(one["impl"], one["metric"]): one for one in record("gpu_epoch")["rows"]}
    labels = {
        "operators, compiled": "compiled, one operator after another",
        "one graph, compiled": "compiled, one CUDA graph",
        "authors' loss": "not compiled, one operator after another",
    }
    table = [line for line in page_text("docs/measured.md").splitlines() if line.startswith("|")]
    for impl, label in labels.items():
        step, rate = rows[impl, "ms_per_step"], rows[impl, "views_per_s"]["median"]
        wanted = f"| {rate:,.0f} | {step['median']:.1f} ({step['min']:.1f} to {step['max']:.1f}) |"
        assert [line for line in table if line.startswith(f"| {label}") and line.endswith(wanted)], impl
    ours, theirs = (rows[impl, "knn20_pct"]["median"] for impl in ("operators, compiled", "authors' loss"))
    text = " ".join(page_text("docs/measured.md").split())
    assert f"together reach {theirs:.1f} % kNN after one epoch in place of {ours:.1f} %" in text
    steps = {one["impl"]: one["median"] for one in record("gpu_step")["rows"] if one["metric"] == "images_per_s"}
    assert f"({steps['as trained']:,.0f} images/s against {steps['fixed batch']:,.0f}" in text
    assert f"ResNet-18 trained at {record('gpu_smoke')['summary']['views_per_s']:,.0f} views/s" in text
