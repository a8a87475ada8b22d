"""What a person sees while work goes on: rich progress on standard error, plain lines when it is not a terminal."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

console = Console(stderr=True, highlight=False, markup=False)  # [extras] in a text are no styles
ConversionProgress = Callable[[str, int, int | None], None]


def bar(*columns: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def file_progress(doing: str) -> Iterator[ConversionProgress]:
    """A function of (file, images done, images in all) that draws one bar per file, after a word such as Converting."""
    with bar(TextColumn("{task.fields[rate]}", markup=False)) as progress:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"{doing} {name}", total=total, rate="")
                if not console.is_terminal:
                    print(f"{doing} {name}", file=sys.stderr)
            speed = progress.tasks[tasks[name]].speed
            progress.update(tasks[name], completed=done, total=total, rate=f"{speed:,.0f} img/s" if speed else "")

        yield show


def conversion_progress() -> contextlib.AbstractContextManager[ConversionProgress]:
    return file_progress("Converting")


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function of (images done, images in all) that draws one bar."""
    with bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class TrainingProgress:
    """Draws the records of a run: rates, loss and its terms, kNN, share of time waiting for data, time left."""

    def __init__(self) -> None:
        self.progress = bar(TextColumn("{task.fields[status]}", markup=False))
        self.task: Any = None
        self.evaluation = ""

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)

    def __call__(self, record: dict[str, Any]) -> None:
        match record["event"]:
            case "start":
                self.start(record)
            case "step":
                self.progress.update(self.task, completed=record["step"], status=step_text(record) + self.evaluation)
            case "evaluation":
                self.evaluation = "  " + evaluation_text(record)
                console.print(
                    f"epoch {record['epoch']:g}: {evaluation_text(record)}, {record['train_s']:.0f} s of training"
                )
            case "note":
                console.print(record["message"])
            case "warning":
                console.print(f"Warning: {record['message']}")

    def start(self, record: dict[str, Any]) -> None:
        if self.task is not None:  # an earlier run of a sweep
            self.progress.remove_task(self.task)
        self.evaluation = ""
        self.task = self.progress.add_task("train", total=record["total_steps"], completed=record["step"], status="")
        console.print(
            f"{record['total_steps']} steps of {record['batch_size']} images and {record['views']} views"
            f" on {record['device']}" + (f", continuing after step {record['step']}" if record["step"] else "")
        )
        console.print(f"Loader {record['loader']}")
        if "threads" in record:
            console.print(record["threads"])
        if not record["evaluated"]:
            console.print("No labeled images are held out (data.val_count), so there is no evaluation while training.")


def step_text(record: dict[str, Any]) -> str:
    names = ("invariance", "redundancy", "variance", "covariance")
    terms = "  ".join(f"{name} {record[name]:.4g}" for name in names if name in record)
    rates = f"{record['images_per_s']:,.0f} img/s  {record['views_per_s']:,.0f} views/s"
    return f"{rates}  loss {record['loss']:.4g} ({terms})  data {record['load_pct'] + record['views_pct']:.0f} %"


def evaluation_text(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {pct:.1f} %" for name, pct in probes_of(record).items())


def probes_of(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Accuracies in percent by the probe's name; of several kNN the first that the recipe names."""
    found = {key.removeprefix(prefix): pct for key, pct in record.items() if key.startswith(prefix)}
    k = next((match[1] for key in found if (match := re.fullmatch(r"knn(\d+)_pct", key))), "")
    names = {f"knn{k}_pct": f"kNN (k = {k})", "ridge_pct": "ridge", "linear_pct": "linear"}
    return {name: found[key] for key, name in names.items() if key in found}


def summary_text(summary: dict[str, Any]) -> str:
    """A few lines for the end of a run: accuracies, on held-out images where there is no test set, and where all is."""
    lines = [
        f"{summary['name']}: {summary['views']:,} views in {summary['train_s']:.0f} s of training"
        f" ({summary['views_per_s']:,.0f} views/s)"
    ]
    tested = probes_of(summary, "test_")
    images = "test" if tested else "held-out images"
    rows = {f"{name} on {images}": pct for name, pct in (tested or probes_of(summary["validation"])).items()}
    for prefix, what in (("raw_pixel_", "raw pixels"), ("untrained_", "the untrained network")):
        rows |= {f"{name} of {what}": pct for name, pct in probes_of(summary, prefix).items()}
    lines += [f"  {name:36s} {pct:5.1f} %" for name, pct in rows.items()]
    lines.append(f"Results: {summary['run_dir']}/summary.json, metrics.jsonl, checkpoints/")
    return "\n".join(lines)


def doctor_text(found: dict[str, Any]) -> str:
    """Tables of what `doctor.examine` found."""
    checks = Table("", "", "works", "found", Column("what mends it", overflow="fold"), box=None, pad_edge=False)
    for check in found["checks"]:
        works = Text("yes", "green") if check["works"] else Text("no", "red")
        checks.add_row(check["kind"], check["name"], works, check["detail"], check["fix"])
    tables = [checks]
    if found["stages"]:
        stages = Table("stage", "what was timed", Column("img/s", justify="right"), "", box=None, pad_edge=False)
        for stage in found["stages"]:
            remark = "slowest" if stage["name"] == found["slowest"] else "when opened" if stage["once"] else ""
            stages.add_row(stage["name"], stage["work"], f"{stage['images_per_s']:,.0f}", remark)
        tables.append(stages)
    with (out := Console(highlight=False, markup=False)).capture() as text:
        for table in tables:
            out.print(table, "")
        if found["note"]:
            out.print(found["note"])
    return text.get().rstrip()
