"""One process trains in a folder; an error that ends it is recorded there, signals and other ranks leave nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastssl
from fastssl.errors import Interrupted, UserError
from fastssl.runs import reading
from fastssl.runs.directory import FAILURE, Records, lock, record_failure
from fastssl.runs.files import atomic_json


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (UserError("It broke.", "Repair it."), {"what": "It broke.", "fix": "Repair it."}),
        (ValueError("odd"), {"what": "ValueError: odd", "fix": ""}),
        (Interrupted("SIGTERM", Path("run")), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_errors_are_noted_and_signals_are_not(
    tmp_path: Path, error: BaseException, note: dict[str, str] | None
) -> None:
    with pytest.raises(type(error)), record_failure(tmp_path):
        raise error
    assert ((tmp_path / FAILURE).exists() and json.loads((tmp_path / FAILURE).read_text())) == (note or False)
    with record_failure(tmp_path):
        assert not (tmp_path / FAILURE).exists(), "a new start takes the note away"


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="odd"), record_failure(None):
        raise ValueError("odd")
    assert not list(tmp_path.iterdir())


def test_a_run_from_python_is_noted_and_a_refused_one_is_not(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    wild = tiny_recipe | {"optim": {"lr": 1e30, "name": "sgd"}}
    with pytest.raises(UserError, match="not finite"):
        fastssl.train(wild, run_dir=tmp_path / "wild")
    (row,) = reading.listing(tmp_path)
    assert row["state"] == "failed"
    assert "not finite" in row["note"]
    with pytest.raises(UserError, match="larger than"):
        fastssl.train(tiny_recipe | {"data": {**tiny_recipe["data"], "batch_size": 4096}}, run_dir=tmp_path / "big")
    assert not (tmp_path / "big").exists()


HOLD = """
import sys, time
from pathlib import Path
from fastssl.runs.directory import lock
with lock(Path(sys.argv[1]), on_warning=print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_locked_while_a_process_trains_and_free_when_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert reading.state_of(tmp_path) == "running"
        with pytest.raises(UserError, match="Another process"), lock(tmp_path, on_warning=pytest.fail):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert reading.state_of(tmp_path) == "interrupted"
    with lock(tmp_path, on_warning=pytest.fail):
        assert reading.state_of(tmp_path) == "running"


def test_one_process_holds_a_lock_once(tmp_path: Path) -> None:
    with (
        lock(tmp_path, on_warning=pytest.fail),
        pytest.raises(UserError, match="Another process"),
        lock(tmp_path, on_warning=pytest.fail),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_warning_and_no_other_process(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    warnings: list[str] = []
    with lock(tmp_path, on_warning=warnings.append):
        assert reading.state_of(tmp_path) == "interrupted"
    (warning,) = warnings
    assert "has no locks" in warning
    assert "\n" not in warning


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """The gradient's norm, say, at a step that fp16's scaler leaves out: JSON has no word for it."""
    records = Records(tmp_path / "metrics.jsonl", pytest.fail)
    records.write({"event": "step", "gradient_norm": float("inf"), "terms": [float("nan"), 1.5, (-float("inf"),)]})
    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert written == {"event": "step", "gradient_norm": None, "terms": [None, 1.5, [None]]}
    atomic_json(tmp_path / "summary.json", {"validation": {"gradient_norm": float("nan")}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"validation": {"gradient_norm": None}}


def test_metrics_are_never_padded(tmp_path: Path) -> None:
    """A checkpoint that counts lines which a loss of power took must not fill their place with zeros."""
    records = Records(tmp_path / "metrics.jsonl", pytest.fail)
    records.write({"event": "step"})
    assert records.sync() == ""
    size = records.size()
    records.cut(size + 100)
    assert records.size() == size
    records.cut(0)
    assert records.size() == 0
