"""A finished run is given more epochs where its schedule allows it; damage never makes a run begin again in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import one_torch_thread, tiny

import fastssl
from fastssl.errors import UserError
from fastssl.runs import checkpoint

Data = tuple[Path, Path]
SHORT: dict[str, dict[str, Any]] = {"optim": {"schedule": "constant"}, "evaluate": {"linear_epochs": 0, "knn_k": [5]}}


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["event"] == "step"]


def test_more_epochs_of_a_constant_schedule_are_those_of_one_longer_run(tiny_data: Data, tmp_path: Path) -> None:
    files = (tiny_data[0], None)
    with one_torch_thread():
        for folder, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
            recipe = tiny(files, **SHORT, train={"epochs": epochs})
            summary = fastssl.train(recipe, run_dir=tmp_path / folder, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert summary["epochs"] == 2
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["steps"] == 10


def test_a_schedule_that_has_ended_says_how_to_go_on(finished_run: Path, tiny_data: Data, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="its cosine schedule ends with epoch 2") as error:
        fastssl.train(tiny(tiny_data, train={"epochs": 4}), run_dir=tmp_path / "run", resume=True)
    assert "model.weights=" in error.value.fix
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_unasked(
    finished_run: Path, tiny_data: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for path in checkpoint.existing(run / "checkpoints"):
        (path / checkpoint.WEIGHTS).write_bytes(b"damage")
    before = {path.name: path.read_bytes() for path in run.glob("*.json*")}
    with pytest.raises(UserError, match=r"Every checkpoint in .* is damaged") as error:
        fastssl.train(tiny(tiny_data), run_dir=run, resume=True)
    assert {path.name: path.read_bytes() for path in run.glob("*.json*")} == before
    assert str(run / "checkpoints") in error.value.fix
    shutil.rmtree(run / "checkpoints")  # what the message asks for
    assert fastssl.train(tiny(tiny_data), run_dir=run, resume=True)["steps"] == 10
    assert len(losses(run)) == 10
