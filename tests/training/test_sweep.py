"""A sweep runs its grid once, continues where it stopped, and lets no cell spoil the others."""

import json
import os
from pathlib import Path
from typing import Any

import command
import pytest

from fastssl.cli.tables import sweep_table
from fastssl.errors import Interrupted, UserError
from fastssl.training import loop, sweep


def test_grid_values_are_yaml_and_commas_inside_brackets_belong_to_a_value() -> None:
    grid = sweep.parse_grid(
        ["optim.lr=0.1,0.2", "model.projector=[8,8],[16, 16]", "loss.name=vicreg", "data.loader=auto"]
    )
    assert grid == {
        "optim.lr": [0.1, 0.2],
        "model.projector": [[8, 8], [16, 16]],
        "loss.name": ["vicreg"],
        "data.loader": ["auto"],
    }


@pytest.mark.parametrize("texts", [["optim.lr"], ["=1,2"], ["optim.lr="], ["optim.lr=[1,2"], ["a=1", "a=2"], ["a={b:"]])
def test_what_is_no_grid_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="grid"):
        sweep.parse_grid(texts)


def test_cells_are_the_product_with_a_folder_each(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    grid = {"optim.lr": [0.001, 1e-5], "model.projector": [[8, 8], [16, 16], [88]]}
    found = sweep.cells(tiny_recipe, grid, seeds=2, out=tmp_path)
    assert len({cell.folder for cell in found}) == len(found) == 12
    for cell in found:
        assert not isinstance(cell.recipe, UserError)
        assert cell.recipe.optim.lr == cell.changes["optim.lr"]
        assert list(cell.recipe.model.projector) == cell.changes["model.projector"]
        assert cell.recipe.seed == cell.changes["seed"]
    again = sweep.cells(tiny_recipe, {"optim.lr": [1e-5]} | {"model.projector": [[88]]}, seeds=2, out=tmp_path)
    assert {cell.folder for cell in again} <= {cell.folder for cell in found}, "a cell keeps its folder"


def test_values_that_look_alike_have_folders_of_their_own(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    found = sweep.cells(tiny_recipe, {"name": ["a/b", "a-b", "../a", "x" * 300]}, seeds=1, out=tmp_path)
    assert len({cell.folder for cell in found}) == 4
    assert all(cell.folder.parent == tmp_path for cell in found)


def test_a_grid_of_a_wrong_key_or_two_seeds_is_refused_at_once(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lrr is unknown \(did you mean lr"):
        sweep.sweep(tiny_recipe, {"optim.lrr": [1, 2]}, out=tmp_path / "out")
    with pytest.raises(UserError, match="seed"):
        sweep.sweep(tiny_recipe, {"seed": [1, 2]}, seeds=2, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"optim\.lr the value 0\.1 twice"):
        sweep.sweep(tiny_recipe, {"optim.lr": [0.1, 0.2, 0.10]}, out=tmp_path / "out")
    grid = sweep.parse_grid(["optim.lr=0.001,1e-3", "data.batch_size=16,16", "train.epochs=1,2"])
    with pytest.raises(UserError) as refused:
        sweep.sweep(tiny_recipe, grid, out=tmp_path / "out")
    assert "optim.lr the value 0.001 twice, as 0.001 and 1e-3" in refused.value.what
    assert "data.batch_size the value 16 twice" in refused.value.what
    assert not (tmp_path / "out").exists()


def test_failures_are_noted_and_the_rest_is_run_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"data.batch_size": [32, 1, 4096]}  # one that works, one refused by the schema, one by the data
    made = sweep.sweep(tiny_recipe, grid, seeds=2, out=tmp_path)
    states = [cell["state"] for cell in made["cells"]]
    assert states == ["done", "done", "failed", "failed", "failed", "failed"]
    assert "data.batch_size" in made["cells"][2]["error"]
    assert "larger than the 160 images" in made["cells"][4]["error"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == made
    first, second = (cell["validation"]["knn5_pct"] for cell in made["cells"][:2])
    setting = made["settings"][0]
    assert setting["metric"] == "knn5_pct"
    assert (setting["mean"], setting["n"], setting["seeds"]) == (pytest.approx((first + second) / 2), 2, 2)
    assert made["settings"][1]["n"] == 0
    text = sweep_table(made)
    assert text.count("failed") == 4
    assert "2 of 2" in text
    assert "Compared by kNN (k = 5) at the last evaluation, on held-out images." in text
    ran: list[Path] = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda recipe, **more: ran.append(more["run_dir"]) or train(recipe, **more))
    assert sweep.sweep(tiny_recipe, grid, seeds=2, out=tmp_path) == made
    assert [path.name for path in ran] == ["batch_size=4096_seed=0", "batch_size=4096_seed=1"], "done cells stay"


def test_a_cell_whose_precision_was_auto_is_run_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["train.precision=auto", "train.epochs=1"]
    made = sweep.sweep(tiny_recipe, {"optim.lr": [0.002]}, out=tmp_path, changes=changes)
    monkeypatch.setattr(loop, "train", lambda recipe, **more: pytest.fail("a finished cell is trained again"))
    assert sweep.sweep(tiny_recipe, {"optim.lr": [0.002]}, out=tmp_path, changes=changes) == made


def test_a_stopped_sweep_goes_on_and_ends_as_if_it_had_not_been(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"optim.lr": [0.002, 0.004]}
    whole = sweep.sweep(tiny_recipe, grid, out=tmp_path / "whole")
    seen: list[int] = []

    def stop_in_the_second_cell(record: dict[str, Any]) -> None:
        seen.extend([record["number"]] if record["event"] == "cell" else [])
        if record["event"] == "step" and seen[-1] == 2 and record["step"] == 7:
            os.kill(os.getpid(), 15)

    with pytest.raises(Interrupted):
        sweep.sweep(tiny_recipe, grid, out=tmp_path / "parts", observe=stop_in_the_second_cell)
    stopped = json.loads((tmp_path / "parts" / "sweep.json").read_text())
    assert [cell["state"] for cell in stopped["cells"]] == ["done", "interrupted"]
    after = sweep.sweep(tiny_recipe, grid, out=tmp_path / "parts")
    for a, b in zip(whole["cells"], after["cells"], strict=True):
        assert (a["state"], a["test"], a["epoch"]) == (b["state"], b["test"], b["epoch"])


def cell(lr: float, held_out: dict[str, float], test: dict[str, float]) -> dict[str, Any]:
    return {"changes": {"optim.lr": lr}, "state": "done", "validation": held_out, "test": test}


def test_cells_are_judged_on_held_out_images_and_never_on_test() -> None:
    good_on_test = cell(0.1, {"knn5_pct": 40.0, "rankme": 9.0}, {"knn5_pct": 90.0})
    good_held_out = cell(0.2, {"knn5_pct": 60.0, "rankme": 8.0}, {"knn5_pct": 50.0})
    rows = sweep.settings([good_on_test, good_held_out])
    assert [(row["metric"], row["mean"]) for row in rows] == [("knn5_pct", 40.0), ("knn5_pct", 60.0)]


def test_cells_without_held_out_labels_are_judged_by_a_figure_that_the_table_names() -> None:
    rows = [cell(0.1, {"rankme": 9.0}, {"knn5_pct": 90.0}), cell(0.2, {"rankme": 8.0, "knn5_pct": 3.0}, {})]
    made = {"cells": rows, "settings": sweep.settings(rows)}
    assert [(row["metric"], row["mean"]) for row in made["settings"]] == [("rankme", 9.0), ("rankme", 8.0)]
    assert "Compared by RankMe" in sweep_table(made)


def test_another_recipes_cell_is_left_as_it_is(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    sweep.sweep(tiny_recipe, {"optim.lr": [0.002]}, out=tmp_path)
    before = (tmp_path / "lr=0.002" / "summary.json").read_bytes()
    made = sweep.sweep(tiny_recipe, {"optim.lr": [0.002]}, out=tmp_path, changes=["train.epochs=3"])
    assert made["cells"][0]["state"] == "failed"
    assert "started with another recipe; train.epochs differ" in made["cells"][0]["error"]
    assert (tmp_path / "lr=0.002" / "summary.json").read_bytes() == before


def test_the_command_tells_by_its_exit_code(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe))
    words = ["sweep", "tiny.yaml", "--grid", "data.batch_size=32,4096", "--json"]
    done = command.fastssl(*words, cwd=tmp_path, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stdout, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert [cell["state"] for cell in made["cells"]] == ["done", "failed"]
    assert "Failed: data.batch_size 4096" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "tiny-sweep" / "batch_size=32" / "summary.json").exists()
