"""Writers take a run's numbers where they are asked to, and whatever happens to them, the run continues."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs.directory import check_run_dir
from fastssl.training import loop, trackers


class Fake:
    """Remembers what it is given, and raises or hangs where it is asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.written, self.closed = fails, list[tuple[int, dict[str, float]]](), False

    def __call__(self, recipe: Recipe, folder: Path, step: int) -> "Fake":
        self.fail("open")
        return self

    def fail(self, when: str) -> None:
        if self.fails == when:
            raise ConnectionError("the service is away")
        if self.fails == f"{when} hangs":
            threading.Event().wait()

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.fail("write")
        self.written.append((step, dict(numbers)))

    def close(self) -> None:
        self.fail("close")
        self.closed = True


def trained(
    recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **fakes: Fake
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Summary, records and warnings of a run with these writers on."""
    monkeypatch.setattr(trackers, "OPENERS", fakes)
    monkeypatch.setattr(trackers, "installed", lambda name: True)
    resolved = load(recipe | {"log": dict.fromkeys(fakes, True)})
    records: list[dict[str, Any]] = []
    summary = loop.train(resolved, run_dir=folder, observe=records.append)
    return summary, records, warnings_of(records)


def warnings_of(records: list[dict[str, Any]]) -> list[str]:
    """Of writers; the tiny set has fewer neighbors than are asked for, which is said, too."""
    said = [record["message"] for record in records if record["event"] == "warning"]
    return [message for message in said if not message.startswith("kNN uses k = ")]


def test_everything_is_written_once_with_its_step(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    summary, records, warnings = trained(tiny_recipe, tmp_path / "run", monkeypatch, tensorboard=fake)
    assert warnings == []
    assert fake.closed
    losses = [(step, n["train/loss"]) for step, n in fake.written if "train/loss" in n]
    assert losses == [(r["step"], r["loss"]) for r in records if r["event"] == "step"]
    held_out = [(step, n["val/knn5_pct"]) for step, n in fake.written if "val/knn5_pct" in n]
    assert held_out == [(r["step"], r["knn5_pct"]) for r in records if r["event"] == "evaluation"]
    step, last = fake.written[-1]
    assert (step, last["test/linear_pct"]) == (summary["steps"], summary["test_linear_pct"])


@pytest.mark.parametrize("when", ["open", "write", "close", "close hangs"])
def test_a_failing_writer_is_told_once_and_changes_nothing(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 1.0 if when == "close hangs" else 60.0)
    bad, good = Fake(when), Fake()
    summary, records, warnings = trained(tiny_recipe, tmp_path / "run", monkeypatch, wandb=bad, tensorboard=good)
    assert len(warnings) == 1
    assert warnings[0].startswith("wandb ")
    assert ("the service is away" in warnings[0]) == (when != "close hangs")
    assert summary["steps"] == max(r["step"] for r in records if r["event"] == "step") == 10
    assert len(good.written) == len([r for r in records if r["event"] in ("step", "evaluation")]) + 1
    assert good.closed


def test_a_missing_package_is_said_with_its_extra(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    resolved = load(tiny_recipe | {"log": {"tensorboard": True}})
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch, trackers.Writers(resolved, tmp_path, warn=warnings.append) as both:
        patch.setattr(trackers, "installed", lambda name: name != "tensorboard")
        both({"event": "start", "step": 0})
    assert warnings == ["tensorboard is not installed, nothing goes there: pip install 'fastssl-vision[tensorboard]'."]


def test_off_by_default_and_no_part_of_what_a_resume_compares(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    assert not load(tiny_recipe).log.tensorboard
    assert not load(tiny_recipe).log.wandb
    loop.train(tiny_recipe, run_dir=tmp_path / "run")
    check_run_dir(tmp_path / "run", load(tiny_recipe | {"log": {"wandb": True}}), resume=True)


def test_tensorboards_files_hold_the_runs_numbers(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    records = list[dict[str, Any]]()
    loop.train(tiny_recipe | {"log": {"tensorboard": True}}, run_dir=tmp_path / "run", observe=records.append)
    assert not warnings_of(records)
    events = loader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {r["step"]: pytest.approx(r["loss"]) for r in records if r["event"] == "step"}


def test_wandb_offline_leaves_a_run_to_sync(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    resolved, warnings = load(tiny_recipe | {"log": {"wandb": True}}), list[str]()
    folder = tmp_path / "run"
    folder.mkdir()
    with trackers.Writers(resolved, folder, warn=warnings.append) as both:
        both({"event": "start", "step": 0})
        both({"event": "step", "step": 1, "loss": 1.5})
    assert warnings == []
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow makes of SQLAlchemy
def test_mlflow_keeps_a_runs_numbers_and_settings_over_a_resume(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    resolved, warnings, folder = load(tiny_recipe | {"log": {"mlflow": True}}), list[str](), tmp_path / "run"
    folder.mkdir()
    for first in (0, 2):
        with trackers.Writers(resolved, folder, warn=warnings.append) as both:
            both({"event": "start", "step": first})
            both({"event": "step", "step": first + 1, "loss": 1.5 - first / 4})
    assert warnings == []
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fastssl").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 1.5), (3, 1.0)]
    assert run.data.params["augment.views"] == "2"
    assert run.info.status == "FINISHED"
