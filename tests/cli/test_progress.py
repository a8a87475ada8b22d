"""What a person sees while training: in a terminal of 80 x 24 and in a pipe, as real processes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from terminal import ANSI, COLUMNS, in_terminal

from fastssl.training import progress

STEP = {"event": "step", "loss": 123.456789, "load_pct": 1.0, "views_pct": 2.0}
START = {"event": "start", "total_steps": 39100, "batch_size": 512, "views": 4, "device": "cpu", "step": 0}
START |= {"loader": "resident: it fits", "evaluated": False, "images": 0, "train_s": 0.0}


def command(folder: Path, recipe: dict[str, Any]) -> list[str]:
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    return [sys.executable, "-m", "fastssl", "train", "tiny.yaml"]


def test_a_terminal_of_80_columns_shows_steps_and_time_left_in_one_line(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    text = ANSI.sub("", in_terminal(command(tmp_path, tiny_recipe), tmp_path))
    drawn = [line.strip() for line in re.split(r"[\r\n]+", text) if "━" in line]
    steps = [line for line in drawn if "/10" in line]
    assert steps
    assert max(map(len, drawn)) <= COLUMNS
    assert all(re.search(r"\d+/10\b", line) for line in steps)
    assert any(re.search(r"10/10 +0:00 left +loss \S+ +\S+ views/s", line) for line in steps)
    assert any("linear probe" in line for line in drawn), "the probe at the end shows that it works"


def test_a_pipe_gets_plain_lines_for_unlabeled_runs_too(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    data = {key: value for key, value in tiny_recipe["data"].items() if key != "test_path"} | {"val_count": 0}
    words = command(tmp_path, tiny_recipe | {"data": data})
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert not ANSI.search(done.stderr)
    assert any(
        re.match(r"step 12 of 12, 0:00 left, loss \S+, \S+ views/s, epoch 2, invariance", line) for line in lines
    )
    evaluations = [line for line in lines if line.startswith("epoch ")]
    assert len(evaluations) == 2
    assert all("RankMe" in line and "n = 200" in line for line in evaluations)
    assert re.search(r"^  loss \S+ \(invariance \S+, redundancy \S+\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  RankMe .*participation ratio .*n = 200\)$", done.stdout, re.MULTILINE)


def in_python(folder: Path, recipe: dict[str, Any], *runs: str) -> list[str]:
    """A script that trains once for each text, which ends the call's arguments."""
    calls = [f"fastssl.train('tiny.yaml', run_dir='runs/{n}'{words})" for n, words in enumerate(runs, 1)]
    text = "\n".join(["import fastssl", *calls, ""])
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    (folder / "own.py").write_text(text)
    return [sys.executable, "own.py"]


def test_python_shows_a_bar_in_a_terminal(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    text = ANSI.sub("", in_terminal(in_python(tmp_path, tiny_recipe, ""), tmp_path))
    drawn = [line.strip() for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert max(map(len, drawn)) <= COLUMNS
    assert any(re.search(r"10/10 +0:00 left +loss \S+ +\S+ views/s", line) for line in drawn)


def test_python_is_silent_in_a_terminal_on_request_and_for_whoever_observes(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    words = in_python(tmp_path, tiny_recipe, ", progress=False", ", observe=lambda record: print(record['event'])")
    lines = ANSI.sub("", in_terminal(words, tmp_path)).splitlines()
    assert lines[0] == "start"  # of the second run
    assert {"step", "evaluation"} <= set(lines) <= {"start", "step", "evaluation", "progress", "note", "warning"}
    assert (tmp_path / "runs" / "2" / "summary.json").exists()


def test_python_writes_lines_to_a_pipe_only_on_request(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    words = in_python(tmp_path, tiny_recipe, "", ", progress=True")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("10 steps of"), "the first run, which was not asked, writes nothing"
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert re.match(r"step 10 of 10, 0:00 left, loss \S+", steps[-1])
    assert (tmp_path / "runs" / "2" / "summary.json").exists()


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    parts = ["120/39100  1:02:33 left", "loss 123.5", "98,765 views/s", "epoch 3.1"]
    assert progress.fitting(parts, 200) == "  ".join(parts)
    assert progress.fitting(parts, len("  ".join(parts)) - 1) == "  ".join(parts[:-1])
    assert progress.fitting(parts, 3) == parts[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90000, "25:00:00")]
)
def test_time_left_is_read_as_a_clock(seconds: float, text: str) -> None:
    assert progress.clock_text(seconds) == text


def test_plain_lines_come_every_half_minute_and_every_epoch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.TrainingProgress() as observe:
        observe(START)
        for step, seconds, epoch in ((10, 5.0, 0.1), (20, 31.0, 0.2), (30, 40.0, 0.3), (40, 45.0, 1.0)):
            now[0] = 1000.0 + seconds
            observe(STEP | {"step": step, "epoch": epoch, "images": 512 * step, "train_s": seconds})
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d+) of 39,100, ", line)[1] for line in printed] == ["20", "40"]  # type: ignore[index]
    # 39,060 to go at 40 s for 30 steps: the first ten may have compiled kernels
    assert "14:28:00 left" in printed[1]


def test_the_rate_after_a_resume_is_that_of_the_process_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.TrainingProgress() as observe:
        observe(START | {"step": 1000, "images": 512_000, "train_s": 10.0})
        for step, seconds in ((1010, 22.0), (1020, 30.0), (1030, 38.0)):
            observe(STEP | {"step": step, "epoch": float(step), "images": 512 * step, "train_s": seconds})
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    # 10 steps of 512 images and 4 views in 12 s, and then, without the first ones, in 8 s each; 204,800 views/s before
    assert [re.search(r", (\S+) views/s", line)[1] for line in printed] == ["1,707", "2,560", "2,560"]  # type: ignore[index]
