"""A run that an error ends says so in its folder, from Python too; signals, refusals and other ranks leave nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

import fastssl
from fastssl.errors import Interrupted, UserError
from fastssl.runs import reading
from fastssl.runs.failure import FAILURE, noted


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (UserError("It broke.", "Mend it."), {"what": "It broke.", "fix": "Mend it."}),
        (ValueError("odd"), {"what": "ValueError: odd", "fix": ""}),
        (Interrupted("SIGTERM", Path("run")), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_errors_are_noted_and_signals_are_not(
    tmp_path: Path, error: BaseException, note: dict[str, str] | None
) -> None:
    with pytest.raises(type(error)), noted(tmp_path):
        raise error
    assert ((tmp_path / FAILURE).exists() and json.loads((tmp_path / FAILURE).read_text())) == (note or False)
    with noted(tmp_path):
        assert not (tmp_path / FAILURE).exists(), "a new start takes the note away"


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="odd"), noted(None):
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
