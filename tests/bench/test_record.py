"""The record's script: a recipe over seeds, its levers at equal views, and a record that keeps both."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import one_torch_thread

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import claims_time
import record
from claims import refuse_unmeasured

from fastssl.errors import UserError
from fastssl.recipe.load import load

LEVERS = {
    "short": ["train.epochs=1"],
    "levers": {"half the batch": ["data.batch_size=16"], "more decay": ["optim.weight_decay=0.1"]},
}


def run_of(seconds: float, *accuracies: float) -> dict[str, Any]:
    curve = [
        {"knn20_pct": value, "ridge_pct": value + 1, "train_s": seconds * (i + 1), "step": i, "epoch": i, "images": i}
        for i, value in enumerate(accuracies)
    ]
    return {"views": 100, "train_s": seconds, "views_per_s": 1.0, "commit": "a", "evaluations": curve} | {
        f"test_{metric}": accuracies[-1] for metric in record.METRICS
    }


def test_gains_are_over_the_recipe_at_equal_seeds():
    runs = {record.BASE: [run_of(1, 50), run_of(1, 60)], "lever": [run_of(1, 53), run_of(1, 64)]}
    rows = record.lever_rows(runs, {"lever": [1.25, 1.5]}, {"lever": ["a=b"]})
    by_name = {(one["impl"], one["metric"]): one for one in rows}
    assert by_name["lever", "gain_knn20_pct"]["values"] == [3, 4]
    assert by_name["lever", "gain_knn20_pct"]["mean"] == 3.5
    assert by_name["lever", "val_ridge_pct"]["values"] == [54, 65]
    assert by_name["lever", record.SPEED]["values"] == [1.25, 1.5]
    assert (record.BASE, record.SPEED) not in by_name


def test_a_machine_whose_speed_drifts_leaves_the_ratio_of_views_per_second(tiny_recipe, monkeypatch):
    base = load(tiny_recipe)
    clock, slowness = 0.0, 1.0

    def step_of_seconds(seconds: float) -> Any:
        def step(epoch: int) -> float:
            nonlocal clock, slowness
            slowness *= 1.001
            clock += seconds * slowness
            return 0.0

        return step

    seconds = {record.BASE: 1.0, "half the batch": 0.25, "slower": 2.0}
    monkeypatch.setattr(
        claims_time, "steps_of", lambda recipes: {name: step_of_seconds(seconds[name]) for name in recipes}
    )
    monkeypatch.setattr(claims_time.time, "perf_counter", lambda: clock)
    half = load(base, [f"data.batch_size={base.data.batch_size // 2}"])
    speeds = record.speeds_of({record.BASE: base, "half the batch": half, "slower": base})
    assert slowness > 1.05  # more than the ratios below are off
    assert speeds["half the batch"] == pytest.approx([2.0] * 5, rel=0.005)
    assert speeds["slower"] == pytest.approx([0.5] * 5, rel=0.005)


def test_a_run_that_never_arrives_makes_the_median_later_than_any(tiny_recipe):
    runs = [run_of(10, 50, 61), run_of(10, 50, 55), run_of(10, 50, 52)]
    reached = record.record_rows(load(tiny_recipe), runs, 60.0)[-1]
    assert (reached["values"], reached["median"], reached["seeds"]) == ([20], None, 3)
    assert record.record_rows(load(tiny_recipe), runs, 51.0)[-1]["values"] == [20, 20, 20]


def test_levers_of_other_numbers_of_views_are_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"Not as many views as the recipe has: longer\."):
        record.lever_recipes(load(tiny_recipe), [], {"longer": ["train.epochs=50"], "same": ["optim.lr=0.1"]})


@pytest.mark.parametrize(
    "text", ["", "- a", "short: []", "{short: [], levers: [a]}", "{short: [], levers: {a: b}}", "{short: [", "\xe9"]
)
def test_a_table_that_is_none_is_refused(text, tmp_path):
    path = tmp_path / "levers.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not a table of levers"):
        record.levers_of(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        record.levers_of(tmp_path / "absent.yaml")
    path.write_text("{short: [], levers: {the recipe: []}}")
    with pytest.raises(UserError, match="has a lever named the recipe"):
        record.levers_of(path)


def test_what_cannot_be_compared_is_refused_before_anything_runs(tiny_recipe, tmp_path):
    base = load(tiny_recipe, ["data.val_count=0", "evaluate.knn_k=[5]", "data.test_path=null"])
    with pytest.raises(UserError) as error:
        refuse_unmeasured(base, on_test=True)
    assert error.value.fix == "Set data.val_count=1000, say and evaluate.knn_k=[20] and data.test_path."
    path, table = tmp_path / "base.yaml", tmp_path / "levers.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe | {"evaluate": {"knn_k": [20]}}))
    table.write_text(yaml.safe_dump(LEVERS))
    with pytest.raises(UserError, match=r"No lever is named less\."):
        record.main([str(path), "--levers", str(table), "--only", "less", "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_the_shipped_levers_fit_the_recipe():
    recipe = load(record.ROOT / "recipes" / "cifar10_cpu.yaml")
    for path in (record.ROOT / "bench").glob("levers*.yaml"):
        short, levers = record.levers_of(path)
        assert len(record.lever_recipes(recipe, short, levers)) == len(levers) + 1


def test_the_command_measures_once_and_keeps_every_part(tiny_recipe, tmp_path, capsys):
    base, table, out = tmp_path / "base.yaml", tmp_path / "levers.yaml", tmp_path / "record.json"
    base.write_text(yaml.safe_dump(tiny_recipe | {"evaluate": {"knn_k": [20], "linear_epochs": 0}}))
    table.write_text(yaml.safe_dump(LEVERS))
    words = [str(base), "--out", str(tmp_path / "runs"), "--json", str(out)]
    with one_torch_thread():
        record.main(words)
        record.main([*words, "--levers", str(table)])
        times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
        record.main([*words, "--levers", str(table), "--seeds", "2", "--only", "more decay"])
    assert len(times) == 4
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert {p.parent.name for p in (tmp_path / "runs").rglob("summary.json")} - {p.parent.name for p in times} == {
        "the-recipe-s1",
        "more-decay-s1",
    }
    made = json.loads(out.read_text())
    assert set(made["parts"]) == {"record", "levers"}
    assert {one["impl"] for one in made["rows"]} == {record.BASE, *LEVERS["levers"]}
    assert {one["part"] for one in made["rows"]} == {"record", "levers"}
    assert len(made["parts"]["record"]["curves"][0]) == load(tiny_recipe).train.epochs
    assert "half the batch" in capsys.readouterr().out
    speeds = {one["impl"]: one for one in made["rows"] if one["metric"] == record.SPEED}
    assert set(speeds) == set(LEVERS["levers"])
    assert {one["n"] for one in speeds.values()} == {5}


def test_a_record_is_continued_where_its_runs_folders_are_gone(tiny_recipe, tmp_path, capsys):
    base, table, out = tmp_path / "base.yaml", tmp_path / "levers.yaml", tmp_path / "record.json"
    base.write_text(yaml.safe_dump(tiny_recipe | {"evaluate": {"knn_k": [20], "linear_epochs": 0}}))
    table.write_text(yaml.safe_dump(LEVERS))
    words = [str(base), "--json", str(out), "--resume"]

    def run(folder: str, *more: str) -> dict[str, Any]:
        with one_torch_thread():
            record.main([*words, "--out", str(tmp_path / folder), *more])
        return json.loads(out.read_text())

    def trained_in(folder: str) -> set[str]:
        return {path.parent.name for path in (tmp_path / folder).rglob("summary.json")}

    first = run("a")
    run("a", "--levers", str(table))
    again = run("b", "--seeds", "2")
    assert trained_in("b") == {"seed1"}
    assert again["parts"]["record"]["curves"][0] == first["parts"]["record"]["curves"][0]
    before, now = ({r["metric"]: r for r in made["rows"] if r["part"] == "record"} for made in (first, again))
    assert {name: one["values"][0] for name, one in before.items() if one["n"]} == {
        name: one["values"][0] for name, one in now.items() if before[name]["n"]
    }
    table.write_text(yaml.safe_dump(LEVERS | {"levers": LEVERS["levers"] | {"half the batch": ["data.batch_size=8"]}}))
    third = run("c", "--levers", str(table))
    said = capsys.readouterr().err
    assert f"2 runs are those of {out}. 1 others there are" in said  # the recipe's and the lever's that is unchanged
    assert trained_in("c") == {"half-the-batch-s0"}
    kept = [[r for r in made["rows"] if r["impl"] == "more decay"] for made in (again, third)]
    assert kept[0] == kept[1]
    assert third["parts"]["levers"]["commits"] == again["parts"]["levers"]["commits"]
    third["parts"]["levers"]["hardware"]["cpu"] = "another"
    out.write_text(json.dumps(third))
    with pytest.raises(UserError, match="is of another machine"):
        run("d", "--levers", str(table))
    table.write_text(yaml.safe_dump(LEVERS | {"short": ["train.epochs=2"]}))
    out.write_text(json.dumps(again))
    with pytest.raises(UserError, match="is of another shortening"):
        run("d", "--levers", str(table))
    out.write_text("{")
    with pytest.raises(UserError, match=r"is not a record of bench/record\.py"):
        run("d")
