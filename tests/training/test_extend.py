"""A finished run is given more epochs where its schedule allows it; damage never makes a run begin again in silence."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_torch_thread, tiny

import fastssl
from fastssl.errors import Interrupted, UserError
from fastssl.pretrained.export.export import export
from fastssl.runs import checkpoint
from fastssl.training import guards
from fastssl.training.online_probes import Prober

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
    assert "and summary.json" in error.value.fix
    shutil.rmtree(run / "checkpoints")  # what the message asks for
    (run / "summary.json").unlink()
    assert fastssl.train(tiny(tiny_data), run_dir=run, resume=True)["steps"] == 10
    assert len(losses(run)) == 10


class Dropping(torch.nn.Module):
    """A small backbone that draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 4, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout(0.5)
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BF: torch.Tensor = self.layers(images_BCHW)
        return features_BF


def dropping() -> Dropping:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        return Dropping()


def test_what_a_network_draws_is_the_same_after_a_resume(tiny_data: Data, tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record.get("step") == 3 and record["event"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = tiny((tiny_data[0], None), **SHORT, train={"epochs": 1, "parallel": "operators"})
    options: dict[str, Any] = {"backbone": dropping(), "run_dir": tmp_path / "parts", "resume": True}
    with one_torch_thread():
        fastssl.train(recipe, run_dir=tmp_path / "whole", backbone=dropping())
        with pytest.raises(Interrupted):
            fastssl.train(recipe, observe=stop, **options)
        fastssl.train(recipe, **options)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_finished_run_without_its_checkpoints_is_left_as_it_is(finished_run: Path, tiny_data: Data, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix}
    with pytest.raises(UserError, match="is finished, and its checkpoints are gone"):
        fastssl.train(tiny(tiny_data), run_dir=run, resume=True)
    (run / "failure.json").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix} == before


def test_a_finished_run_keeps_its_environment(finished_run: Path, tiny_data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "environment.json").write_text('{"of": "its own machine"}')
    fastssl.train(tiny(tiny_data), run_dir=run, resume=True)
    assert json.loads((run / "environment.json").read_text()) == {"of": "its own machine"}


def test_checkpoints_without_their_recipe_are_not_trained_over(
    finished_run: Path, tiny_data: Data, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        fastssl.train(tiny(tiny_data, optim={"lr": 0.01}), run_dir=run)
    assert len(list((run / "checkpoints").iterdir())) == len(list((finished_run / "checkpoints").iterdir()))


@pytest.mark.parametrize("left", ["nothing", "a half line"])
def test_metrics_that_are_missing_are_reported_and_the_file_stays_readable(
    left: str, finished_run: Path, tiny_data: Data, tmp_path: Path
) -> None:
    run, seen = tmp_path / "run", list[str]()
    shutil.copytree(finished_run, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000010")  # back to the end of the first epoch
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"" if left == "nothing" else whole[:100])
    fastssl.train(
        tiny(tiny_data), run_dir=run, resume=True, observe=lambda record: seen.append(str(record.get("message")))
    )
    assert [text for text in seen if "metrics.jsonl lacks lines of the first 5 steps" in text]
    assert len(losses(run)) == 5


def test_an_evaluation_is_no_step_that_hangs(tiny_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pats, during, measure = list[str](), list[int](), Prober.while_training

    def counted(self: Prober, *arguments: Any, **options: Any) -> dict[str, float]:
        before = len(pats)
        metrics = measure(self, *arguments, **options)
        during.append(len(pats) - before)
        return metrics

    monkeypatch.setattr(Prober, "while_training", counted)
    monkeypatch.setattr(guards.Watchdog, "pat", lambda self: pats.append("pat"))
    evaluate = {"linear_epochs_while_training": 7, "linear_epochs": 0}
    fastssl.train(tiny((tiny_data[0], None), evaluate=evaluate, train={"epochs": 1}), run_dir=tmp_path)
    assert len(during) == 1
    assert during[0] >= 7 + 4  # every epoch of the linear probe, every part whose features are extracted


def test_a_run_goes_on_without_the_weights_that_it_started_from(
    tiny_recipe: dict[str, Any], tiny_run: Path, tmp_path: Path
) -> None:
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    export(tiny_run, start, to="safetensors")
    settings = {"train": tiny_recipe["train"] | {"checkpoint_every_steps": 1, "keep_checkpoints": 20}}
    tiny = tiny_recipe | settings | {"model": tiny_recipe["model"] | {"weights": str(start)}}
    whole = fastssl.train(tiny, run_dir=run)
    (run / "summary.json").unlink()
    for path in checkpoint.existing(run / "checkpoints"):
        if checkpoint.steps_in(path) > 4:
            shutil.rmtree(path)
    start.unlink()
    assert fastssl.train(tiny, run_dir=run, resume=True)["validation"]["loss"] == whole["validation"]["loss"]
    with pytest.raises(UserError, match=r"model\.weights .* does not exist"):
        fastssl.train(tiny, run_dir=tmp_path / "new")
