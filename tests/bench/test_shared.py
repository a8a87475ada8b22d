"""The benchmark of a shared machine: busy processes that end, a quota that holds, and a record of real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import tiny

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import shared

from fastssl.recipe.load import load


def test_busy_processes_run_and_end() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with shared.busy_processes(2):
        busy = [child for child in psutil.Process().children() if child.pid not in before]
        assert len(busy) == 2
        assert all(child.is_running() for child in busy)
    assert not [child for child in busy if child.is_running()]


def test_a_quota_limits_the_command_and_is_named() -> None:
    with shared.quota(1.0) as (prefix, setter):
        assert setter in ("systemd", "cgroup", "taskset")
        code = "from fastssl.runs.machine import cores; print(cores().count)"
        done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) == 1
    with shared.quota(None) as (prefix, setter):
        assert (prefix, setter) == ([], "")


def test_shares_are_of_the_same_rounds_alone() -> None:
    values = {("alone", "fastssl"): [100.0, 200.0], ("next to 1 busy", "fastssl"): [50.0, 120.0]}
    rows = shared.rows_of(values, {key: {"threads": 2} for key in values}, {"batch": 32})
    share = next(row for row in rows if row["metric"] == "share_of_alone_pct")
    assert share["values"] == [50.0, 60.0]
    assert share["work"] == {"batch": 32, "situation": "next to 1 busy"}


def test_a_loop_that_fails_before_it_is_warm_is_said_and_left_out(
    tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shared.parse(["--seconds", "0.1", "--workers", "1"])
    recipe = load(tiny_recipe, [f"data.path={tmp_path / 'absent.beton'}"])
    assert shared.in_a_process("fastssl", recipe, [], 1, arguments) is None
    assert "fastssl is left out: " in capsys.readouterr().err


def test_one_run_writes_the_record(
    tiny_data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny((tiny_data[0], None))))
    words = [str(recipe), "--loops", shared.SHARED_VIEWS, "--busy", "1", "--rounds", "1"]
    shared.main([*words, "--seconds", "0.05", "--out", str(tmp_path / "shared.json")])
    made = json.loads((tmp_path / "shared.json").read_text())
    rates = [(row["impl"], row["work"]["situation"]) for row in made["rows"] if row["metric"] == "views_per_s"]
    situations = ["alone", "next to 1 busy", "quota of 1 cores"]
    assert rates == [(shared.SHARED_VIEWS, where) for where in situations]
    assert all(row["median"] > 0 for row in made["rows"])
    assert "share_of_alone_pct" in capsys.readouterr().out
