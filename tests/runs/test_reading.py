"""Run directories are listed as they are: state, progress, differences; damage is a clear error, never a crash."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import command
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terminal import ANSI, COLUMNS, in_terminal

from fastssl.cli.tables import runs_table, sweep_table
from fastssl.errors import UserError
from fastssl.runs import reading
from fastssl.runs.directory import lock

FILES = ("recipe.yaml", "metrics.jsonl", "summary.json", "data.json", "environment.json")


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "copy"
    shutil.copytree(finished_run, folder)
    return folder


def test_a_finished_run_is_read_as_it_was_written(finished_run: Path) -> None:
    run = reading.read(finished_run)
    summary = json.loads((finished_run / "summary.json").read_text())
    assert run.state == "done"
    assert [int(step["step"]) for step in run.steps] == list(range(1, summary["steps"] + 1))
    assert [evaluation["epoch"] for evaluation in run.evaluations] == [1.0, 2.0]
    assert run.summary["test_knn5_pct"] == summary["test_knn5_pct"]
    assert run.views_per_s == pytest.approx(summary["views"] / run.steps[-1]["train_s"])


def test_states(copy: Path) -> None:
    assert reading.state_of(copy) == "done"
    with lock(copy, on_warning=pytest.fail):
        assert reading.state_of(copy) == "running"
    (copy / "summary.json").unlink()
    assert reading.state_of(copy) == "interrupted"
    (copy / "failure.json").write_text('{"what": "x"}')
    assert reading.state_of(copy) == "failed"


def test_looking_does_not_stop_a_run_from_starting(copy: Path) -> None:
    reading.listing(copy.parent)
    with lock(copy, on_warning=pytest.fail):
        assert reading.listing(copy.parent)[0]["state"] == "running"


def test_listing_compares_recipes_and_survives_a_damaged_run(copy: Path) -> None:
    for name, lr, seed in (("b", "0.5", 0), ("c", "0.001", 7)):
        shutil.copytree(copy, copy.parent / name)
        recipe = copy.parent / name / "recipe.yaml"
        recipe.write_text(
            recipe.read_text().replace("lr: 0.002", f"lr: {lr}").replace("\nseed: 0", f"\nseed: {seed}", 1)
        )
    shutil.copytree(copy, copy.parent / "d")
    (copy.parent / "d" / "metrics.jsonl").write_text("{not json}\n")
    found = {Path(row["run_dir"]).name: row for row in reading.listing(copy.parent)}
    assert found["b"]["differences"] == {"seed": 0, "optim.lr": 0.5}
    assert found["c"]["differences"] == {"seed": 7, "optim.lr": 0.001}
    assert found["d"]["state"] == "damaged"
    assert "line 1" in found["d"]["note"]
    best = max(reading.read(copy).evaluations, key=lambda e: e["knn5_pct"])
    assert (found["copy"]["best_pct"], found["copy"]["best_epoch"]) == (best["knn5_pct"], best["epoch"])
    assert found["copy"]["validation"]["knn5_pct"] == reading.read(copy).evaluations[-1]["knn5_pct"]
    text = runs_table(list(found.values()))
    assert "b: seed 0, optim.lr 0.5" in text
    assert "n = 40;" in text
    assert "damaged" in text


def test_at_80_columns_a_run_is_a_line_and_differences_follow(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = reading.listing(copy)
    changes = {"loss.redundancy_weight": 0.01, "optim.lr": 0.5, "augment.side_px": 32, "model.projector": [64, 64]}
    names = ("first", "second", "third")
    rows = [row | {"run_dir": f"runs/{name}", "differences": changes, "test": {}} for name in names]
    table, _, differences = runs_table(rows).partition("\n\nDifferences\n")
    lines = table.splitlines()
    assert len(lines) == 1 + 3 + 1  # headings, runs, what was measured on
    assert all(len(line) <= 80 for line in lines[:4])
    assert [line.split(":")[0].strip() for line in differences.splitlines()] == [
        "runs/first",
        "runs/second",
        "runs/third",
    ]


def test_links_to_runs_are_followed_and_never_in_circles(copy: Path, tmp_path: Path) -> None:
    runs, scratch = copy.parent, tmp_path / "scratch"
    shutil.copytree(copy, scratch / "deep" / "run")
    (scratch / "back").symlink_to(runs)
    (runs / "linked").symlink_to(scratch / "deep" / "run")
    (runs / "latest").symlink_to(copy)
    (runs / "here").symlink_to(runs)
    (runs / "gone").symlink_to(tmp_path / "nowhere")
    (runs / "itself").symlink_to("itself")
    assert reading.find(runs) == [copy, runs / "linked"], "each run once, by its own name"
    (runs / "linked").unlink()
    (runs / "storage").symlink_to(scratch)
    assert reading.find(runs) == [copy, runs / "storage" / "deep" / "run"]
    (tmp_path / "all").symlink_to(runs)
    assert reading.find(tmp_path / "all") == [tmp_path / "all" / "copy", tmp_path / "all" / "storage" / "deep" / "run"]


def test_an_accuracy_of_zero_is_shown(copy: Path) -> None:
    (row,) = reading.listing(copy)
    zero = row | {"validation": row["validation"] | {"knn5_pct": 0.0}, "best_pct": 0.0, "test": {}}
    assert "0.0 ± 4.4 % (0.0)" in runs_table([zero])


def test_what_is_too_wide_for_the_terminal_is_a_block_with_nothing_cut(copy: Path) -> None:
    name = "a-name-of-forty-characters-as-people-give"
    copy.rename(copy.parent / name)
    summary = copy.parent / name / "summary.json"
    tested = {f"test_{key}_pct": 12.345 for key in ("ridge", "linear")}
    summary.write_text(json.dumps(json.loads(summary.read_text()) | tested))
    words = [sys.executable, "-m", "fastssl", "runs"]
    lines = ANSI.sub("", in_terminal(words, copy.parent.parent)).replace("\r\n", "\n").splitlines()
    piped = command.fastssl("runs", cwd=copy.parent.parent, timeout=60).stdout
    for text in ("\n".join(lines), piped):
        assert f"runs/{name}" in text
        assert all(value in text for value in ("done", "2/2", " %", "12.3 %", "test ridge", "views/s", " s"))
        assert "…" not in text
    assert lines[0] == f"runs/{name}"
    assert all(line.startswith("  ") for line in lines[1:3])
    assert max(map(len, lines[:4])) <= COLUMNS
    assert piped.splitlines()[0].split()[0] == "run", "a pipe has room for the table"


def test_a_cell_that_is_too_wide_for_the_terminal_begins_with_its_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    (row,) = reading.listing(copy)
    cell = row | {"changes": {"optim.lr": 0.1, "model.projector": [2048, 2048, 2048]}}
    lines = sweep_table({"cells": [cell, cell], "settings": []}).splitlines()
    assert lines[0] == "optim.lr 0.1; model.projector [2048, 2048, 2048]; state done"
    assert all(len(line) <= 60 for line in lines[:4])
    assert lines.count(lines[0]) == 2


def test_a_line_being_written_is_not_damage(copy: Path) -> None:
    whole = len(reading.read(copy).steps) + len(reading.read(copy).evaluations)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    after = reading.read(copy)
    assert len(after.steps) + len(after.evaluations) == whole


def test_every_number_that_a_step_can_have_is_read(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    wild = {"loss": 1e15, "redundancy": 3.4e38, "invariance": -3.4e38}
    lines[1] = json.dumps(json.loads(lines[1]) | wild)
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert reading.read(copy).steps[1].items() >= wild.items()


@pytest.mark.parametrize("value", ["NaN", "1e999", '"five"', "null", "true", "1" + "0" * 400, "1e16", "-3"])
def test_a_metric_that_is_no_number_is_named_with_its_line(copy: Path, value: str) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    lines[1] = json.dumps({**record, "train_s": 0}).replace('"train_s": 0', f'"train_s": {value}')
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged \(line 2\)"):
        reading.read(copy)


def mutated(data: bytes, place: float, action: str, junk: bytes) -> bytes:
    at = int(place * len(data))
    match action:
        case "cut":
            return data[:at]
        case "insert":
            return data[:at] + junk + data[at:]
        case "overwrite":
            return data[:at] + junk + data[at + len(junk) :]
        case "drop":
            return data[:at] + data[at + 1 + len(junk) :]
        case _:
            return junk


JUNK = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"[" * 2000, b"{}", b"[]", b"null\n", b"NaN", b"1e999", b'{"event": []}\n', b"9" * 5000, b"\x00"]),
)


@given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1),
    action=st.sampled_from(["cut", "insert", "overwrite", "drop", "all"]),
    junk=JUNK,
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_a_clear_error(copy: Path, name: str, place: float, action: str, junk: bytes) -> None:
    before = (copy / name).read_bytes()
    try:
        (copy / name).write_bytes(mutated(before, place, action, junk))
        (row,) = reading.listing(copy.parent)
        assert row["state"] == "done" or str(copy / name) in row["note"]
    finally:
        (copy / name).write_bytes(before)


def test_the_command_lists_a_failed_run_and_why(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wild.yaml").write_text(json.dumps(tiny_recipe | {"optim": {"lr": 1e30, "name": "sgd"}}))

    fastssl = partial(command.fastssl, cwd=tmp_path, timeout=600)

    assert fastssl("train", "wild.yaml").returncode == 2
    (row,) = json.loads(fastssl("runs", "--json").stdout.splitlines()[-1])["runs"]
    assert row["state"] == "failed"
    assert "not finite" in row["note"]
    assert fastssl("train", "wild.yaml").returncode == 2, "the folder is taken"
    assert "not finite" in fastssl("runs").stdout
    missing = fastssl("runs", "nowhere")
    assert missing.returncode == 2
    assert len(missing.stderr.strip().splitlines()) == 2
