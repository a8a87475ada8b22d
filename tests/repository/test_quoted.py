"""Every figure that README and docs quote is in a record of bench/results, and the page names the record's commit."""

import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "bench" / "results"
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
ACCURACY = re.compile(r"\d+\.\d ± \d+\.\d %")


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def record(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text())


def median(name: str, metric: str, impl: str, **work: object) -> float:
    """The median of the one row of a record with this metric, implementation and work."""
    rows = [row for row in record(name)["rows"] if (row["metric"], row["impl"]) == (metric, impl)]
    (value,) = (row["median"] for row in rows if work.items() <= row["work"].items())
    return value


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_names_a_record_names_its_commit(page):
    prose = re.sub(r"^```.*?^```", "", page_text(page), flags=re.MULTILINE | re.DOTALL)
    names = [name for name in re.findall(r"`bench/results/(\w+)\.json`", prose) if (RECORDS / f"{name}.json").exists()]
    assert not {name for name in names if record(name)["commit"][:7] not in prose}


def test_the_measurements_list_every_record():
    rows = re.findall(
        r"^\| `bench/results/(\w+)\.json` \| .* \| (\w{7}) \|$", page_text("docs/measured.md"), re.MULTILINE
    )
    assert dict(rows) == {path.stem: record(path.stem)["commit"][:7] for path in RECORDS.glob("*.json")}


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_accuracy_of_the_claims_is_in_a_record(page):
    verdicts = [verdict for path in RECORDS.glob("claims*.json") for verdict in record(path.stem)["verdicts"]]
    recorded = {accuracy for verdict in verdicts for accuracy in ACCURACY.findall(verdict["text"])}
    quoted = ACCURACY.findall(page_text(page))
    assert quoted or page != "docs/claims.md"
    assert set(quoted) <= recorded


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("README.md", "tta_peers"),
        ("docs/measured.md", "tta_peers"),
        ("docs/measured.md", "tta"),
        ("docs/claims.md", "tta"),
    ],
)
def test_every_quoted_time_to_accuracy_is_in_its_record(page, name):
    text = page_text(page).replace(" s (", " (")
    for row in (row for row in record(name)["rows"] if row["metric"] == "train_s"):
        assert f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f})" in text, row["impl"]


def test_the_table_of_the_readme_is_that_of_the_records():
    job = {impl: {m: median("tta_peers", m, impl) for m in ("train_s", "views_per_s")} for impl in LOOPS}
    seconds, rate = ("train_s", "{:.1f}"), ("views_per_s", "{:,.0f}")
    for label, own, (metric, shown) in (
        ("38 % kNN", "fastssl, Muon", seconds),
        ("AdamW in all three", "fastssl", seconds),
        ("optimizer step", "fastssl", rate),
    ):
        ours, *peers = (job[impl][metric] for impl in (own, *PEERS))
        ratio = min(peers) / ours if metric == "train_s" else ours / max(peers)
        cells = [cell.split(" (")[0] for cell in row_of("README.md", label)]
        assert cells == [*(shown.format(value) for value in (ours, *peers)), f"{ratio:.1f}"]
    for side_px in (32, 224):
        work = {"side_px": side_px, "views": 4, "blur": False}
        ours, peer = (median("augment", "views_per_s", impl, **work) for impl in ("fastssl-cpu", "torchvision-v1"))
        cells = row_of("README.md", f"views of {side_px} px")
        assert cells == [f"{ours:,.0f}", "–", f"{peer:,.0f}", f"{ours / peer:.0f}"]
    text = " ".join(page_text("README.md").split())
    for peer, said in (("dali", "{} and {} times as fast, against"), ("ffcv", "and solarize {} and {} times")):
        works = [{"side_px": side_px, "views": 4, "blur": False} for side_px in (32, 224)]
        rates = [[median("augment", "views_per_s", impl, **work) for impl in ("fastssl-cpu", peer)] for work in works]
        assert said.format(*(f"{ours / theirs:.1f}" for ours, theirs in rates)) in text


PEERS = ("lightly", "plain torchvision")
LOOPS = ("fastssl, Muon", "fastssl", *PEERS)


def row_of(page: str, label: str) -> list[str]:
    """The cells of the one table row whose first cell has a label."""
    rows = [line.strip("|").split(" | ") for line in page_text(page).splitlines() if line.startswith("|")]
    (cells,) = (cells[1:] for cells in rows if label in cells[0])
    return [cell.strip() for cell in cells]


def test_the_speed_ups_over_the_peers_are_those_of_the_record():
    text = page_text("docs/measured.md")
    for own in ("fastssl, Muon", "fastssl"):
        of = {one["against"]: one for one in record("tta_peers")["speed_ups"] if one["recipe"] == own}
        cells = [f"{of[peer]['ratio']:.1f} ({of[peer]['low']:.1f} to {of[peer]['high']:.1f})" for peer in PEERS]
        assert f"| {own} | {' | '.join(cells)} |" in text


def test_the_times_to_60_pct_are_those_of_the_record():
    made, text = record("tta_peers_60"), " ".join(page_text("docs/measured.md").split())
    rows = {(row["impl"], row["metric"]): row for row in made["rows"]}

    def shown(metric: str, pattern: str) -> list[str]:
        keys = ("median", "min", "max")
        three = ([pattern.format(rows[impl, metric][key]) for key in keys] for impl in LOOPS)
        return ["{} ({} to {})".format(*figures) for figures in three]

    (seeds,) = {rows[impl, "train_s"]["seeds"] for impl in LOOPS}
    assert row_of("docs/measured.md", f"seconds to 60 % kNN, {seeds} seeds") == shown("train_s", "{:,.0f}")
    assert row_of("docs/measured.md", "views to 60 % kNN") == shown("views", "{:,.0f}")
    medians = [f"{rows[impl, 'views_per_s']['median']:,.0f}" for impl in LOOPS]
    assert f"| {' | '.join(medians)} |" in page_text("docs/measured.md")
    of = {(one["recipe"], one["against"]): one for one in made["speed_ups"]}
    muon, adamw = ([of[own, peer] for peer in PEERS] for own in LOOPS[:2])
    said = (
        "With Muon that is {} times sooner than lightly and {} than the plain loop, with the same optimizer {} and {}"
    )
    spreads = [f"{one['ratio']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in (*muon, *adamw)]
    assert said.format(*spreads) in text
    late = [statistics.median(map(last_point, made["curves"][impl])) for impl in LOOPS]
    said = (
        "from 59 to 60 % it took {:.0f} s with Muon, {:.0f} s with AdamW, lightly {:.0f} s and the plain loop {:.0f} s"
    )
    assert said.format(*late) in text
    said = "ours with Muon is {:.1f} and {:.1f} times and with AdamW {:.1f} and {:.1f} times sooner"
    assert said.format(*(one["ratio"] for one in (*muon, *adamw))) in " ".join(page_text("README.md").split())


def last_point(run: dict[str, Any]) -> float:
    """Seconds from 59 to 60 % kNN."""
    early, late = (next(e["train_s"] for e in run["curve"] if e["knn_pct"] >= pct) for pct in (59, 60))
    return late - early


def test_the_figure_of_the_readme_shows_the_medians_of_its_record():
    drawn = page_text("docs/figures/time-to-accuracy.svg")
    assert all(f"{median('tta_peers', 'train_s', impl):.4g} s" in drawn for impl in LOOPS)


def test_the_rates_of_augmentation_are_those_of_the_record():
    text = page_text("docs/measured.md")
    for side_px, views in ((32, 2), (32, 4), (224, 2), (224, 4)):
        for impl in ("fastssl-cpu", "dali", "torchvision-v1"):
            value = median("augment", "views_per_s", impl, side_px=side_px, views=views, blur=False)
            assert f"{value:,.0f}" in text, (impl, side_px, views)


def test_the_rates_of_loading_are_those_of_the_record():
    text = page_text("docs/measured.md")

    def rate(impl: str, **work: object) -> float:
        return median("loaders", "images_per_s", impl, **work)

    padded = {"images": "cifar", "views": 1, "crop": "pad"}
    cut = [rate(impl, **padded) for impl in ("fastssl-resident", "ffcv", "ffcv-normalised")]  # its spelling then
    cut += [rate(impl, images="photographs", views=4) for impl in ("fastssl-ffcv", "ffcv")]
    cut += [rate(impl, images="photographs", views=0) for impl in ("fastssl-ffcv", "ffcv")]
    assert [f"{value:,.0f}" for value in cut if f"{value:,.0f}" not in text] == []
    raw = [rate(impl, images="cifar", views=0) / 1e6 for impl in ("fastssl-ffcv", "ffcv")]
    assert "million images/s | {:.2f} (our `ffcv` loader) | {:.2f} |".format(*raw) in text


def test_the_share_of_loading_and_views_in_a_step_is_that_of_the_record():
    networks = ("resnet18 x1 cifar", "resnet_tiny x0.25 patch2")
    ratios = [median("tta_peers", "time_against_fixed", "fastssl, as trained", backbone=name) for name in networks]
    assert row_of("docs/measured.md", "against a fixed batch") == [f"{ratio:.2f}" for ratio in ratios]


def test_the_table_of_the_kernels_is_that_of_the_record():
    shown = ("registers", "local", "shared_bytes", "warps_per_sm", "instructions")
    work = {"channels": 3, "dtype": "bf16", "pixel": "uint8", "layout": "padded", "interpolation": "bilinear"}
    small, large = ({"side_px": side, "policy": policy} for side, policy in ((32, "blurring"), (224, "rotating")))
    labels = {
        "crop`, 32 px": small,
        "params`": large,
        "crop`, 224": large,
        "rotate`": large,
        "color`": large,
        "blur`": large,
    }
    for label, case in labels.items():
        cells = [cell.split(" → ")[-1] for cell in row_of("docs/benchmarks.md", f"`{label}")]
        values = [median("cuda_kernels", m, label.split("`")[0], **case, **work, capability=90) for m in shown]
        assert cells == [f"{value:,.0f}" for value in values], label


def test_the_most_that_a_kernel_takes_is_that_of_the_records():
    names = ("cuda_kernels", "cuda_kernels_triton36", "cuda_kernels_triton37")
    rows = [row for name in names for row in record(name)["rows"]]
    most = {metric: max(row["max"] for row in rows if row["metric"] == metric) for metric in ("local", "shared_bytes")}
    text = page_text("docs/benchmarks.md")
    assert f"at most {most['local']} local loads and stores and {most['shared_bytes']:,} bytes of shared memory" in text
    lanes = min(row["min"] for row in rows if row["metric"] == "lanes_in_a_row")
    assert f"at least {lanes} of the 32 lanes of a warp access" in " ".join(text.split())


def test_the_verdicts_quoted_are_those_of_the_record():
    text = page_text("docs/claims.md")
    rows = re.findall(r"^\| (\d)\. .* \| (holds in part|holds|does not hold)", text, re.MULTILINE)
    assert rows == [(verdict["claim"][0], verdict["outcome"]) for verdict in record("claims")["verdicts"]]


def test_the_table_of_a_shared_machine_is_that_of_the_record():
    loops = ("fastssl, views shared", "fastssl", "lightly", "plain torchvision")
    rates = [row for row in record("shared")["rows"] if row["metric"] == "views_per_s"]
    for situation in {row["work"]["situation"] for row in rates}:
        of = {row["impl"]: row for row in rates if row["work"]["situation"] == situation}
        cells = [f"{row['median']:,.0f} ({row['min']:,.0f} to {row['max']:,.0f})" for row in map(of.get, loops)]
        assert row_of("docs/benchmarks.md", situation) == cells
    shares = [
        f"{row['median']:.0f} % ({row['min']:.0f} to {row['max']:.0f})"
        for row in record("shared")["rows"]
        if row["metric"] == "share_of_alone_pct" and row["work"]["situation"] == "next to 1 busy"
    ]
    text = " ".join(page_text("docs/benchmarks.md").split())
    assert [share for share in shares if share not in text] == []


CELLS = {
    "V2-D1024-fixed-f1": "V = 2, D = 1024",
    "V2-D256-scaled-f0.25": "V = 2 on 25 %, D = 256",
    "V2-D8192-fixed-f1": "V = 2, D = 8192, fixed weight",
    "V2-D2048-fixed-f1": "V = 2, D = 2048, fixed weight",
    "V2-D2048-scaled-f1": "V = 2, D = 2048",
    "V4-D256-scaled-f1": "V = 4, D = 256",
    "V8-D256-scaled-f0.25": "V = 8 on 25 %, D = 256",
}


def test_the_table_of_resnet50_is_that_of_its_record():
    speed_ups = {one["recipe"]: one for one in record("resnet50")["speed_ups"]}
    for cell in {row["impl"] for row in record("resnet50")["rows"]}:
        of = {row["metric"]: row for row in record("resnet50")["rows"] if row["impl"] == cell}
        parts = [of[f"{part}_s"]["median"] for part in ("backbone", "projector", "loss")]
        cells = [
            str(of["test_ridge_pct"]["n"]),
            *(f"{of[f'test_{metric}_pct']['median']:.1f} %" for metric in ("ridge", "knn20")),
            times(speed_ups[cell]),
            f"{of['peak_bytes']['median'] / 1e9:.1f}",
            f"{100 * sum(parts[1:]) / sum(parts):.0f} %",
        ]
        assert f"| {CELLS[cell]} | {' | '.join(cells)} |" in page_text("docs/claims.md")


def times(speed_up: dict) -> str:
    if speed_up["recipe"] == speed_up["against"]:
        return "1"
    return f"{'' if speed_up['bound'] == 'exact' else 'at least '}{speed_up['ratio']:.2f}"


def test_the_seconds_of_resnet50_are_those_of_its_record():
    text = " ".join(page_text("docs/claims.md").split())
    runs = record("resnet50")["curves"]
    step_s = {cell: done[0]["train_s"] / done[0]["steps"] for cell, done in runs.items()}
    reference = step_s.pop("V2-D8192-fixed-f1")
    assert f"{reference:.1f} s and one of the others {min(step_s.values()):.1f} to {max(step_s.values()):.1f} s" in text
    assert f"for {sum(run['clock_s'] for done in runs.values() for run in done) / 3600:.1f} hours in all" in text
    (target,) = {one["target_pct"] for one in record("resnet50")["speed_ups"]}
    assert f"{target:.1f} % by ridge regression" in text
    found = {one["recipe"]: one for one in record("resnet50")["speed_ups"]}
    four, eight = found["V4-D256-scaled-f1"], found["V8-D256-scaled-f0.25"]
    assert f"{times(four)} times sooner ({four['low']:.2f} to {four['high']:.2f} by bootstrap over seeds)" in text
    assert f"{times(eight)} times ({eight['low']:.2f} to {eight['high']:.2f})" in text
    assert f"{times(found['V2-D2048-scaled-f1'])} times sooner with the rule's weight" in text
    assert f"{found['V2-D2048-fixed-f1']['ratio']:.2f} times with the fixed one" in text
    ridge = means("resnet50", "test_ridge_pct")
    ahead = [ridge[one["recipe"]] - ridge["V2-D2048-scaled-f1"] for one in (four, eight)]
    assert "four are {:.1f} points ahead of two with D = 2048 on test, eight {:.1f}".format(*ahead) in text
    ends = [run["curve"][-1]["ridge_pct"] for run in runs["V2-D8192-fixed-f1"]]
    assert f"the second ends below it at {ends[1]:.1f} %" in text


def means(name: str, metric: str, **work: object) -> dict[str, float]:
    """The mean over seeds of each cell of a record."""
    rows = [row for row in record(name)["rows"] if row["metric"] == metric and work.items() <= row["work"].items()]
    return {row["impl"]: statistics.mean(row["values"]) for row in rows}


def test_the_table_of_both_lengths_of_training_is_that_of_their_records():
    short, ridge = (means(name, "test_ridge_pct") for name in ("claims", "claims_long"))
    knn, step_ms, reached_s = (
        means("claims_long", "test_knn20_pct"),
        means("claims_long", "step_ms"),
        means("claims_long", "reached_s", target_pct=66.0),
    )
    for cell, runs in record("claims_long")["curves"].items():
        cells = [f"{short[cell]:.1f} %", str(len(runs)), f"{ridge[cell]:.1f} %", f"{knn[cell]:.1f} %"]
        cells += [f"{step_ms[cell]:.0f}", f"{reached_s[cell]:,.0f}"]
        assert f"| {CELLS[cell]} | {' | '.join(cells)} |" in page_text("docs/claims.md")


def test_what_is_said_of_the_longer_training_follows_from_its_record():
    text = " ".join(page_text("docs/claims.md").split())
    ridge, reached_s = means("claims_long", "test_ridge_pct"), means("claims_long", "reached_s", target_pct=66.0)
    reference, four = "V2-D1024-fixed-f1", "V4-D256-scaled-f1"
    of_four = record("claims_long")["curves"][four]
    eight, two = "V8-D256-scaled-f0.25", "V2-D256-scaled-f0.25"
    assert f"ahead of the reference by {ridge[four] - ridge[reference]:.1f} points" in text
    assert f"reach 66 % {reached_s[reference] / reached_s[four]:.1f} times sooner" in text
    rows = [row for row in record("claims_long")["rows"] if row["work"].get("target_pct") == 68.0 and row["n"]]
    to_68_s = {row["impl"]: statistics.mean(row["values"]) for row in rows}
    assert f"To 68 % it is {to_68_s[reference] / to_68_s[four]:.1f} times as well" in text
    lost = {cell: f"{ridge[reference] - ridge[cell]:.1f}" for cell in (two, eight)}
    assert f"{lost[two]} points with two views and {lost[eight]} with eight" in text
    (verdict,) = (one for one in record("claims_long")["verdicts"] if one["claim"].startswith("4."))
    (ends_pct,) = re.findall(r"ends at (\d+\.\d) %", verdict["text"])
    (arrives,) = re.findall(rf"{four} reaches it in (\d+) s, (\d+\.\d) times sooner", verdict["text"])
    assert f"last value of {ends_pct} % after {int(arrives[0]):,} s, {arrives[1]} times sooner" in text
    curve = [statistics.mean(at) for at in zip(*([p[3] for p in run["curve"]] for run in of_four), strict=True)]
    assert [pct > float(ends_pct) for pct in curve[-3:]] == [False, True, True]
    assert f"but at the last two evaluations alone ({curve[-2]:.1f} and {curve[-1]:.1f} %)" in text
    assert verdict["outcome"] == "holds"
    assert "verdict on claim 4 is that it holds" in text
    (verdict,) = (one["text"] for one in record("claims_long")["verdicts"] if one["claim"].startswith("3."))
    of_eight, of_two = re.findall(r"V = [28] on 25 % (\d+\.\d)", verdict.partition("epochs each")[2])
    assert f"eight views of a quarter have {of_eight} % on validation and two {of_two} %" in text


def test_the_table_of_the_losses_is_that_of_the_record():
    rows = {
        (row["impl"], row["work"]["views"], row["work"]["dim"]): row
        for row in record("losses")["rows"]
        if row["metric"] == "ms"
    }
    for (label, name), dim in itertools.product((("Barlow Twins", "barlow_twins"), ("VICReg", "vicreg")), (256, 8192)):
        both = [rows[f"{library} {name}", 2, dim] for library in ("fastssl", "lightly")]
        *cells, why = row_of("docs/measured.md", f"{label}, D = {dim}")
        assert cells == [f"{row['median']:,.1f} ({row['min']:,.1f} to {row['max']:,.1f})" for row in both]
        assert (why == "–") == (both[0]["median"] < both[1]["median"])
    text = " ".join(page_text("docs/measured.md").split())
    ours, pairs = (rows[name, 16, 256]["median"] for name in ("fastssl barlow_twins", "all pairs"))
    assert f"takes {ours:.1f} ms, and the two-view formula over all pairs of them {pairs:.1f} ms" in text


def test_the_settings_of_the_loss_are_those_of_their_record():
    rows = {(one["impl"], one["metric"]): one["median"] for one in record("epoch_loss")["rows"]}
    for label, impls in {
        "leave-one-out form": ("leave-one-out", "leave-one-out, seed 1"),
        "| weight 0.01 |": ("weight 0.01",),
        "weight 0.026": ("weight 0.026", "weight 0.026, seed 1"),
        "weight 0.052": ("weight 0.052",),
        "| `l2_normalize` |": ("l2_normalize",),
        "| `standardize: joint` |": ("statistics of all views",),
        "| both |": ("both of these",),
        "`form: authors`, the rule's weight": ("authors' form",),
        "the same with both": ("these three",),
        "these three and weight 0.01": ("the authors' loss", "the authors' loss, seed 1"),
    }.items():
        cells = [", ".join(f"{rows[impl, m]:.1f}" for impl in impls) + " %" for m in ("knn20_pct", "ridge_pct")]
        wanted = f"| {' | '.join(cells)} |"
        lines = [line for line in page_text("docs/measured.md").splitlines() if label in line]
        assert [line for line in lines if line.endswith(wanted)], label
