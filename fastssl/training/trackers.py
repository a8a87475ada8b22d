"""TensorBoard, Weights & Biases and MLflow as observers of a run: off by default, and never a reason for a run to stop.

Whatever goes wrong with one (not installed, service away, disk full) is said once; the run continues without it.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fastssl.build import ranks
from fastssl.data.loaders.choose import installed
from fastssl.recipe.schema import Recipe
from fastssl.runs.files import atomic_write
from fastssl.training.progress import ConversionProgress, shown
from fastssl.training.state import Observer

PREFIXES = {"step": "train", "evaluation": "val", "summary": "test"}
POSITIONS = ("step", "epoch", "images", "views")
START_TIMEOUT_S, CLOSE_TIMEOUT_S = 30, 60


class Writer(Protocol):
    """Where numbers go."""

    def write(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder; what a resume writes again replaces what came after its checkpoint."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for each run folder, offline when no key is at hand (wandb would ask for it and wait)."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        import wandb

        mark = folder / "wandb.id"
        if not mark.exists():
            atomic_write(mark, uuid.uuid4().hex)
        self.run: Any = wandb.init(
            project=recipe.log.wandb_project,
            name=folder.name,
            id=mark.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=None if wandb.api.api_key else "offline",
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(init_timeout=START_TIMEOUT_S, silent=True),
        )

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """One MLflow run for each run folder: at MLFLOW_TRACKING_URI, else in mlflow.db in the folder."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        from mlflow import MlflowClient

        local = f"sqlite:///{(folder / 'mlflow.db').absolute()}"  # MLflow 3 refuses to write plain folders
        self.client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        mark = folder / "mlflow.id"
        if not mark.exists():
            experiment = self.client.get_experiment_by_name(recipe.log.mlflow_experiment)
            number = (
                experiment.experiment_id if experiment else self.client.create_experiment(recipe.log.mlflow_experiment)
            )
            atomic_write(mark, self.client.create_run(number, run_name=folder.name).info.run_id)
            for name, value in flat(recipe.model_dump(mode="json")).items():
                self.client.log_param(mark.read_text(encoding="utf-8"), name, value)
        self.run_id = mark.read_text(encoding="utf-8").strip()
        self.client.update_run(self.run_id, status="RUNNING")

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


OPENERS: dict[str, Callable[[Recipe, Path, int], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Writers:
    """An observer of a run, inside a `with`; `train` has one.

    Args:
        recipe: `log` says which writers are on.
        folder: of the run.
        warn: called with one sentence when a writer is given up.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, warn: Callable[[str], None]) -> None:
        self.recipe, self.folder, self.warn = recipe, folder, warn
        self.open: dict[str, Writer] = {}
        self.step = 0

    def __enter__(self) -> Self:
        return self

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Starts the writers at the "start" record, and writes the numbers of steps, evaluations and the summary."""
        if not ranks.is_main():
            return
        if record["event"] == "start":
            self.start(record["step"])
        elif record["event"] in PREFIXES:
            self.step = int(record.get("step", self.step))
            numbers = named(record)
            for name, writer in list(self.open.items()):
                self.guarded(name, partial(writer.write, numbers, self.step))

    def start(self, step: int) -> None:
        for name, opener in OPENERS.items():
            if not getattr(self.recipe.log, name):
                continue
            if not installed(name):
                self.warn(f"{name} is not installed, nothing goes there: pip install 'fastssl-vision[{name}]'.")
                continue

            def begin(name: str = name, opener: Any = opener) -> None:
                self.open[name] = opener(self.recipe, self.folder, step)

            self.guarded(name, begin)

    def summary(self, numbers: Mapping[str, Any]) -> None:
        """Writes what `train` returned."""
        self({"event": "summary"} | {k: v for k, v in numbers.items() if k.startswith("test_")})

    def guarded(self, name: str, action: Callable[[], None]) -> None:
        """Does it, or says what is wrong and continues without this writer."""
        try:
            action()
        except Exception as error:
            self.open.pop(name, None)
            self.warn(f"{name} is given up for this run, which continues: {type(error).__name__}: {error}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes them; one that does not come back in a minute is left behind."""
        for name, writer in list(self.open.items()):
            closing = threading.Thread(target=self.guarded, args=(name, writer.close), daemon=True)
            closing.start()
            closing.join(CLOSE_TIMEOUT_S)
            if closing.is_alive():
                self.warn(f"{name} has not finished after {CLOSE_TIMEOUT_S} s and is left behind.")


@contextlib.contextmanager
def observers(
    recipe: Recipe,
    folder: Path,
    progress: bool | None,
    observe: Observer | None,
    convert_progress: ConversionProgress | None,
) -> Iterator[tuple[Observer, ConversionProgress | None, Writers]]:
    """What a run reports to: the observers given, the progress shown, and the recipe's writers (`log`)."""
    with shown(progress, observe, convert_progress) as (observer, converting):

        def warn(message: str) -> None:
            observer({"event": "warning", "message": message})

        with Writers(recipe, folder, warn=warn) as writers:

            def tell(record: dict[str, Any]) -> None:
                observer(record)
                writers(record)

            yield tell, converting, writers


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return values


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers as train/loss, val/knn20_pct, test/linear_pct."""
    prefix = PREFIXES[record["event"]]
    return {
        f"{prefix}/{key.removeprefix('test_')}": float(value)
        for key, value in record.items()
        if type(value) in (int, float) and key not in POSITIONS
    }
