"""The pair on ResNet-50: cells of equal time, runs of their own processes, and what is said of them."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import one_torch_thread

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import resnet50
from claims_verdicts import Cell

import fastssl
from fastssl.errors import UserError
from fastssl.losses.barlow_twins import redundancy_rule
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe

CELLS = resnet50.cells_of([2048, 8192], 256)


def run_of(seconds: float, *accuracies: float) -> dict[str, Any]:
    count = len(accuracies)
    curve = [{"train_s": seconds * (i + 1) / count, "ridge_pct": value} for i, value in enumerate(accuracies)]
    return {
        "test_ridge_pct": accuracies[-1],
        "test_knn20_pct": accuracies[-1],
        "views": 10,
        "train_s": seconds,
        "peak_bytes": 1 << 20,
        "curve": curve,
    }


def test_the_reference_has_the_most_dimensions_and_others_its_weight_or_their_own(tiny_recipe):
    assert CELLS[0] == Cell(2, 8192, "fixed", 1.0)
    assert set(CELLS[1:3]) == {Cell(4, 256, "scaled", 1.0), Cell(8, 256, "scaled", 0.25)}
    recipes = resnet50.recipes_of(load(tiny_recipe), CELLS, 256)
    weight = {cell.name: recipe.loss.redundancy_weight for cell, recipe in recipes.items()}
    assert weight["V2-D8192-fixed-f1"] == weight["V2-D2048-fixed-f1"] == pytest.approx(redundancy_rule(8192, 2))
    assert weight["V2-D2048-scaled-f1"] == "auto"
    assert {recipe.data.batch_size * recipe.augment.views for recipe in recipes.values()} == {64}


def test_epochs_fill_the_time(tiny_recipe):
    recipe = load(tiny_recipe, ["data.batch_size=16"])
    steps = resnet50.steps_of_an_epoch(recipe)
    longer = resnet50.timed_recipe(recipe, 3, 0.5, run_s=10 * steps * 0.5 + 0.1, points=5)
    assert (longer.train.epochs, longer.seed) == (10, 3)
    assert longer.evaluate.every_steps == 2 * steps
    assert resnet50.timed_recipe(recipe, 0, 1e9, run_s=1, points=5).train.epochs == 1


def test_accuracy_at_equal_time_and_time_to_the_references_end(tiny_recipe):
    recipes = resnet50.recipes_of(load(tiny_recipe), CELLS[:2], 256)
    runs = {CELLS[0]: [run_of(100, 20, 30, 40, 44)], CELLS[1]: [run_of(120, 30, 44, 50, 52)]}
    parts = {resnet50.kind_of(recipe): {"loss_s": 1.0} for recipe in recipes.values()}
    rows, speed_ups = resnet50.report(recipes, runs, parts)
    equal = {row["impl"]: row["values"] for row in rows if row["metric"] == "val_ridge_pct"}
    assert equal == {CELLS[0].name: [44], CELLS[1].name: [50]}  # after 100 s, where the shorter one ends
    assert speed_ups[1]["ratio"] == pytest.approx(100 / 60)
    assert speed_ups[1]["target_pct"] == 44


def test_shares_are_of_the_recipes_own_shapes(tiny_recipe):
    small, large = (resnet50.shares(load(tiny_recipe, [f"model.projector=[{d}, {d}]"])) for d in (8, 2048))
    assert set(small) == {"backbone_s", "projector_s", "loss_s"}
    assert large["projector_s"] > small["projector_s"]
    assert large["loss_s"] > small["loss_s"]


def test_a_run_is_a_process_whose_memory_is_kept(tiny_recipe, tmp_path):
    recipe = load(tiny_recipe, ["train.epochs=1"])
    assert resnet50.finished(tmp_path / "run", recipe, 0.5) is None
    resnet50.train_apart(recipe, tmp_path / "run")
    done = resnet50.finished(tmp_path / "run", recipe, 0.5)
    assert done["peak_bytes"] > 100 << 20
    assert done["train_s"] == done["steps"] / 2
    with pytest.raises(UserError, match="holds a run of another recipe"):
        resnet50.finished(tmp_path / "run", load(recipe, ["seed=7"]), 0.5)


def test_what_asks_the_command_to_stop_asks_its_run():
    before = signal.getsignal(signal.SIGTERM)
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with resnet50.passed_on(process.pid):
        signal.raise_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def trained_here(recipe: Recipe, folder: Path) -> None:
    fastssl.train(recipe, run_dir=folder)
    (folder / "peak.json").write_text('{"peak_bytes": 1}')


def test_the_command_resumes_and_records(tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet50, "train_apart", trained_here)
    base, out = tmp_path / "base.yaml", tmp_path / "resnet50.json"
    base.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(base), "--dims", "16", "--dim", "8", "--run-min", "0.001", "--points", "2", "--seeds", "1"]
    words += ["--out", str(tmp_path / "runs"), "--json", str(out)]
    with one_torch_thread():
        resnet50.main([*words, "--budget-min", "0"])
        assert "The budget is spent with 3 of 3 runs left" in capsys.readouterr().err
        resnet50.main(words)
        made = json.loads(out.read_text())
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
        resnet50.main(words)
    assert len(times) == 3
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert set(made["curves"]) == {cell.name for cell in resnet50.cells_of([16], 8)}
    assert {row["metric"] for row in made["rows"]} >= {"test_ridge_pct", "peak_bytes", "loss_s", "projector_s"}


def test_a_record_is_continued_where_its_runs_folders_are_gone(tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet50, "train_apart", trained_here)
    base, out = tmp_path / "base.yaml", tmp_path / "resnet50.json"
    base.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(base), "--dims", "16", "--dim", "8", "--run-min", "0.001", "--points", "2", "--json", str(out)]

    def run(folder: str, *more: str) -> dict[str, Any]:
        asked = [*words, "--resume", "--out", str(tmp_path / folder), *more]
        monkeypatch.setattr(sys, "argv", ["resnet50.py", *asked])  # a record names its command
        resnet50.main(asked)
        return json.loads(out.read_text())

    with one_torch_thread():
        first = run("a", "--seeds", "1")
        again = run("b", "--seeds", "2")
        assert f"3 runs are those of {out}." in capsys.readouterr().err
        assert {path.parent.name[-3:] for path in (tmp_path / "b").rglob("summary.json")} == {"-s1"}
        for name, done in again["curves"].items():
            assert done[0] == first["curves"][name][0]
            assert done[0]["steps"] == done[1]["steps"]
            assert done[0]["train_s"] == pytest.approx(done[1]["train_s"])
        parts = [[r["median"] for r in made["rows"] if r["metric"] in resnet50.PARTS] for made in (first, again)]
        assert parts[0] == parts[1]
        with pytest.raises(UserError, match="is of another grid"):
            run("c", "--points", "3")
        out.write_text(json.dumps(again | {"hardware": again["hardware"] | {"cpu": "another"}}))
        with pytest.raises(UserError, match="is of another machine"):
            run("c")
