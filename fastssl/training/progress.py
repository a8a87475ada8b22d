"""Progress of long work: one line that fits the terminal, plain lines in a log and a notebook.

All of it goes to standard error, in a notebook below the cell.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from fastssl.build import ranks
from fastssl.build.losses import terms_in
from fastssl.probes import table as probes
from fastssl.training.state import Observer

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)  # [extras] in a text are no styles
ConversionProgress = Callable[[str, int, int | None], None]
PLAIN_EVERY_S = 30.0
BAR_WIDTH = 16


def bar() -> Progress:
    """A bar of fixed width, then as much of the task's line as fits."""
    return Progress(BarColumn(bar_width=BAR_WIDTH), StatusLine(), console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def file_progress(verb: str) -> Iterator[ConversionProgress]:
    """A function of (what, done, in all) that draws one bar for each file, after a word such as Converting."""
    with bar() as progress:
        tasks: dict[str, Any] = {}
        plain = PlainLines()

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total, parts=[f"{verb} {name}"])
                plain.show(f"{verb} {name}", always=True)
            speed = progress.tasks[tasks[name]].speed
            rate = [f"{speed:,.0f}/s"] if speed else []
            progress.update(tasks[name], completed=done, total=total, parts=[*rate, f"{verb} {name}"])
            plain.show(f"{verb} {name}: {done:,}" + (f" of {total:,}" if total else ""))

        yield show


@contextlib.contextmanager
def shown(
    asked: bool | None, observe: Observer | None, convert_progress: ConversionProgress | None
) -> Iterator[tuple[Observer, ConversionProgress | None]]:
    """What a run reports to: the observers given, and the progress shown here.

    Args:
        asked: None shows progress in a terminal and a notebook, unless somebody observes who shows it.
        observe, convert_progress: of `train`.
    """
    if asked is None:
        asked = observe is None and (console.is_terminal or console.is_jupyter)
    given = observe or (lambda record: None)
    if not asked or not ranks.is_main():
        yield given, convert_progress
        return
    with file_progress("Converting") as converting, TrainingProgress() as training:

        def both(record: dict[str, Any]) -> None:
            training(record)
            given(record)

        yield both, convert_progress or converting


class PlainLines:
    """Lines for a log: at most one every PLAIN_EVERY_S, and those that must be shown."""

    def __init__(self) -> None:
        self.shown_s = time.monotonic()

    def show(self, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if not console.is_terminal and (always or now - self.shown_s >= PLAIN_EVERY_S):
            self.shown_s = now
            console.print(text)


class StatusLine(ProgressColumn):
    """What is done and the time left, which never shrink, then as many of a task's parts as there is room for."""

    def render(self, task: Task) -> Text:
        count = f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total is not None else "")
        left_s = task.fields.get("left_s", task.time_remaining)
        first = count if left_s is None else f"{count}  {clock_text(left_s)} left"
        return Text(fitting([first, *task.fields["parts"]], console.width - BAR_WIDTH - 2), no_wrap=True)


def fitting(parts: Sequence[str], width: int) -> str:
    """Parts two spaces apart, from the first up to the last that fits; at least the first."""
    line = parts[0] if parts else ""
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


class TrainingProgress:
    """Draws the records of a run: steps and time left first, then loss, rate and terms as far as there is room."""

    def __init__(self) -> None:
        self.progress = bar()
        self.tasks: dict[str, Any] = {}
        self.plain = PlainLines()
        self.total = self.epoch = 0
        self.views, self.is_warm = 1, False
        self.since_s = time.monotonic()  # where rates begin, and the record then
        self.since: dict[str, Any] = {"step": 0, "images": 0, "train_s": 0.0}

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
                self.step(record)
            case "evaluation":
                console.print(evaluation_text(record))
            case "progress":
                self.draw(record["what"], record["done"], record["total"], [])
                self.plain.show(f"{record['what']}: {record['done']} of {record['total']}")
            case "note":
                console.print(record["message"])
            case "warning":
                console.print(f"Warning: {record['message']}")

    def start(self, record: dict[str, Any]) -> None:
        for task in self.tasks.values():  # an earlier run of a sweep
            self.progress.remove_task(task)
        self.tasks, self.total, self.epoch = {}, record["total_steps"], 0
        self.since_s, self.since, self.views, self.is_warm = time.monotonic(), record, record["views"], False
        after = f", continuing after step {record['step']}" if record["step"] else ""
        console.print(
            f"{self.total} steps of {record['batch_size']} images and {record['views']} views"
            f" on {record['device']}{after}"
        )
        console.print(f"Loader {record['loader']}")
        for name in ("threads", "precision"):
            if name in record:
                console.print(record[name])
        if not record["evaluated"]:
            console.print("No labeled images are held out (data.val_count), so no accuracy is measured while training.")
        self.draw("train", record["step"], self.total, [])

    def step(self, record: dict[str, Any]) -> None:
        step, now_s, since = record["step"], time.monotonic(), self.since
        left_s = (now_s - self.since_s) / max(1, step - since["step"]) * (self.total - step)
        views = self.views * (record["images"] - since["images"])
        parts = step_parts(record, views_per_s=views / max(1e-9, record["train_s"] - since["train_s"]))
        if not self.is_warm:  # the first steps may have compiled kernels
            self.since_s, self.since, self.is_warm = now_s, record, True
        self.draw("train", step, self.total, parts, left_s=left_s)
        new_epoch = int(record["epoch"]) > self.epoch
        self.epoch = int(record["epoch"])
        line = [f"step {step:,} of {self.total:,}", f"{clock_text(left_s)} left", *parts]
        self.plain.show(", ".join(line), always=new_epoch)

    def draw(self, name: str, done: int, total: int, parts: Sequence[str], **fields: Any) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, parts=[])
        self.progress.update(self.tasks[name], completed=done, total=total, parts=[*parts, name], **fields)


def clock_text(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest_s = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes}:{rest_s:02d}"


def step_parts(record: dict[str, Any], *, views_per_s: float) -> list[str]:
    """A step's numbers, the most wanted first; the rate is of this process, the record's is since the run began."""
    waiting_pct = record["load_pct"] + record["views_pct"]
    rates = [f"loss {record['loss']:.4g}", f"{views_per_s:,.0f} views/s", f"epoch {record['epoch']:.3g}"]
    terms = [f"{name} {value:.4g}" for name, value in terms_in(record).items()]
    return [*rates, *terms, f"waiting for data {waiting_pct:.0f} %"]


def evaluation_text(record: dict[str, Any]) -> str:
    """One evaluation in a line, with the number of images next to each metric."""
    parts = []
    accuracies = probes.accuracies_in(record)
    if accuracies:
        shown = ", ".join(f"{label} {pct:.1f} %" for label, pct in accuracies.items())
        parts.append(f"{shown} (n = {record['val_images']:,.0f})")
    if figures := probes.figures_text(record, short=True):
        parts.append(figures)
    return f"epoch {record['epoch']:g}: " + "; ".join([*parts, f"{record['train_s']:.0f} s of training"])
