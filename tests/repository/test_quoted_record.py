"""The figures of docs/record.md are those of bench/results/record.json and networks.json."""

from test_quoted import page_text, record, row_of


def test_the_tables_of_the_record_are_those_of_its_record():
    for part in (name for name in record("record")["parts"] if name.startswith("levers")):
        rows = [row for row in record("record")["rows"] if row["part"] == part]
        of = {impl: {row["metric"]: row for row in rows if row["impl"] == impl} for impl in {r["impl"] for r in rows}}
        for lever in set(of) - {"the recipe"}:
            gains = [of[lever][f"gain_{metric}_pct"] for metric in ("knn20", "ridge")]
            cells = [f"{gain['mean']:+.1f}" for gain in gains]
            speed = of[lever]["views_per_s_ratio"]
            cells += [f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})", str(gains[0]["n"])]
            assert f"| {lever} | {' | '.join(cells)} |" in page_text("docs/record.md")


def test_what_weakens_the_table_of_changes_follows_from_the_record():
    text = " ".join(page_text("docs/record.md").split())
    of = {(row["part"], row["impl"], row["metric"]): row for row in record("record")["rows"]}
    knn, ridge = (
        [of[part, "the recipe", f"val_{m}_pct"] for part in ("levers", "levers_losses")] for m in ("knn20", "ridge")
    )
    knn_0, ridge_0 = knn[0]["values"][0], ridge[0]["values"][0]
    later = knn[1]["values"][0], ridge[1]["values"][0]
    assert f"the later code the recipe has {later[0]:.1f} % and {later[1]:.1f} % with this seed" in text
    assert f"may be {knn_0 - later[0]:.1f} points of kNN and {ridge_0 - later[1]:.1f} of ridge better" in text
    assert f"lie up to {knn[1]['max'] - knn[1]['min']:.1f} points of kNN apart" in text
    same_work = ("momentum 0.95", "rate 0.03", "smaller crops", "weaker color")
    alike = [of["levers", name, "views_per_s_ratio"]["median"] for name in same_work]
    assert "momentum {:.2f}, rate {:.2f}, smaller crops {:.2f}, weaker color {:.2f}".format(*alike) in text
    assert max(abs(ratio - 1) for ratio in alike) < 0.1
    ahead = [
        name for part, name, m in of if (part, m) == ("levers", "gain_knn20_pct") and of[part, name, m]["mean"] > 1
    ]
    on_top = ("larger crops", "gray 0.1")
    assert ahead == ["one projector layer", *(f"one projector layer, {more}" for more in on_top)]
    one = of["levers", "one projector layer", "val_knn20_pct"]["values"]
    assert all(value > base for value, base in zip(one, knn[0]["values"], strict=True))
    pair = "{:.1f}, {:.1f} and {:.1f} % against {:.1f}, {:.1f} and {:.1f} %"
    assert pair.format(*one, *knn[0]["values"]) in text


def test_the_records_own_figures_are_those_of_its_record():
    names = ("record", "record", "record_means", "record_pool", "record_strided")
    parts = [[row for row in record("record")["rows"] if row["part"] == part] for part in names]
    judged_again = [row for row in record("record")["rows"] if row["part"] == "record_32px"]
    parts[0] = judged_again + [row for row in parts[0] if not row["metric"].startswith("test_")]
    assert {row["n"] for rows in parts for row in rows} == {5}
    for label, (metric, to_target) in RECORD_LABELS.items():
        expected = []
        for rows in parts:
            found = [row for row in rows if row["metric"] == metric and ("pct" in row["work"]) == to_target]
            figures = [
                f"{row[key]:.{label.endswith('test, %'):d}f}" for row in found for key in ("median", "min", "max")
            ]
            expected.append("{} ({} to {})".format(*figures) if found else "–")
        assert row_of("docs/record.md", label) == expected
    for name, which in (("recipes/cifar10_cpu.yaml", 0), ("with `resnet_pool`", 3), ("as it was: `resnet_small`", 4)):
        (minutes,) = (
            row["median"] / 60 for row in parts[which] if row["metric"] == "train_s" and "pct" not in row["work"]
        )
        accuracy = row_of("docs/record.md", "kNN (k = 20) on test, %")[which]
        cells = row_of("docs/measured.md", name)
        assert (accuracy in cells[2], cells[1]) == (True, f"{minutes:.1f} min")
    names = {"kNN (k = 20) on test": "kNN (k = 20) on test, %", "whitened kNN": "kNN of whitened features on test, %"}
    for name, label in (names | {"linear probe": "linear probe on test, %"}).items():
        median, spread = row_of("docs/record.md", label)[0].split(" ", 1)
        assert f"{name} {median} % {spread}" in page_text("recipes/cifar10_cpu.yaml")


def test_what_enlarging_gains_follows_from_the_record():
    of = {(row["part"], row["metric"]): row["median"] for row in record("record")["rows"] if "median" in row}
    metrics = [f"test_{probe}_pct" for probe in ("knn20", "linear", "ridge", "whitened_knn20")]
    *less, more = (of["record", metric] - of["record_32px", metric] for metric in metrics)
    said = "{:.1f} points of kNN, {:.1f} of the linear probe and {:.1f} of ridge less and {:.1f} of whitened kNN more"
    assert said.format(*(-value for value in less), more) in " ".join(page_text("docs/record.md").split())


def test_the_table_of_means_over_views_is_that_of_its_record():
    rows = [row for row in record("record")["rows"] if row["part"] == "record_views"]
    of = {(row["work"]["mean_of_views"], row["metric"]): row["values"] for row in rows}
    metrics = [f"test_{probe}_pct" for probe in ("knn20", "whitened_knn20", "ridge", "linear")]
    for count in (1, 2, 4, 16):
        name = f"{count} views" if count > 1 else "the clean image"
        cells = [f"{', '.join(f'{value:.1f}' for value in of[count, metric])} %" for metric in metrics]
        assert f"| {name} | {' | '.join(cells)} |" in page_text("docs/record.md")
    gains = {m: [mean - clean for mean, clean in zip(of[16, m], of[1, m], strict=True)] for m in metrics}
    learned, (loss, least) = [gain for m in metrics[2:] for gain in gains[m]], sorted(gains[metrics[0]])
    said = (
        "gain {:.1f} to {:.1f} points with the probes that learn weights from labels, and lose {:.1f} to {:.1f} of kNN"
    )
    text = " ".join(page_text("docs/record.md").split())
    assert said.format(min(learned), max(learned), -least, -loss) in text
    assert all(two < clean for m in metrics for two, clean in zip(of[2, m], of[1, m], strict=True))


def test_the_table_of_networks_is_that_of_its_record():
    of = {(row["impl"], row["metric"]): row for row in record("networks")["rows"]}
    for name in {impl for impl, _ in of} - {"the recipe"}:
        gains = [of[name, f"gain_{metric}_pct"] for metric in ("knn20", "ridge")]
        cells = [*(f"{gain['mean']:+.1f}" for gain in gains), str(gains[0]["n"])]
        assert f"| {name} | {' | '.join(cells)} |" in page_text("docs/record.md")
    text = " ".join(page_text("docs/record.md").split())
    values = [[f"{v:.1f}" for v in of["the recipe", f"val_{m}_pct"]["values"]] for m in ("knn20", "ridge")]
    assert "kNN {}, {} and {} and ridge {}, {} and {} % with seeds 0, 1 and 2".format(*values[0], *values[1]) in text
    names = ("stem 4x4, averaging between stages", "averaging between stages")
    pairs = [[of[name, f"gain_{metric}_pct"]["mean"] for name in names] for metric in ("knn20", "ridge")]
    assert "adds {:.1f} points of kNN and {:.1f} of ridge".format(*(more - less for more, less in pairs)) in text


def test_the_time_to_60_pct_on_one_machine_is_that_of_its_record():
    text, made = " ".join(page_text("docs/record.md").split()), record("tta_cpu")
    for row in (row for row in made["rows"] if row["metric"] == "train_s"):
        assert f"{row['median']:.1f} s ({row['min']:.1f} to {row['max']:.1f})" in text, row["impl"]
        assert (row["n"], row["seeds"]) == (3, 3)
    (found,) = made["speed_ups"]
    assert f"{found['ratio']:.1f} times ({found['low']:.1f} to {found['high']:.1f} by bootstrap)" in text


RECORD_LABELS = {  # to a metric, and whether it is that of the way to a target
    "kNN (k = 20) on test, %": ("test_knn20_pct", False),
    "kNN of whitened features on test, %": ("test_whitened_knn20_pct", False),
    "ridge regression on test, %": ("test_ridge_pct", False),
    "linear probe on test, %": ("test_linear_pct", False),
    "seconds of training": ("train_s", False),
    "views per second": ("views_per_s", False),
    "seconds to 60 % kNN": ("train_s", True),
}
