"""What the verbs show of long work, and the lines at the end of a run."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fastssl.build.losses import terms_in
from fastssl.probes import table as probes
from fastssl.training.progress import ConversionProgress, file_progress


def conversion_progress() -> contextlib.AbstractContextManager[ConversionProgress]:
    return file_progress("Converting")


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function of (images done, images in all) that draws one bar."""
    with file_progress(what) as show:
        yield lambda done, total: show("", done, total)


def loss_text(record: dict[str, Any]) -> str:
    terms = ", ".join(f"{name} {value:.4g}" for name, value in terms_in(record).items())
    return f"loss {record['loss']:.4g}" + (f" ({terms})" if terms else "")


def summary_text(summary: dict[str, Any]) -> str:
    """A few lines for the end of a run: loss, effective dimensions, accuracies, and where all is."""
    last = summary["validation"]
    compiled = f", {summary['compile_s']:.0f} s of compilation apart" if summary.get("compile_s", 0) >= 1 else ""
    lines = [
        f"{summary['name']}: {summary['views']:,} views in {summary['train_s']:.0f} s of training"
        f" ({summary['views_per_s']:,.0f} views/s){compiled}"
    ]
    lines += [f"  {loss_text(last)}"] if "loss" in last else []
    lines += [f"  {text}" for text in (probes.figures_text(last, short=True),) if text]
    lines += [f"  {label:44s} {text}" for label, text in accuracy_rows(summary)]
    lines.append(f"Results: {summary['run_dir']}/summary.json, metrics.jsonl, checkpoints/")
    return "\n".join(lines)


def accuracy_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, accuracy with its 95 % interval): on test, else on held-out images; the best evaluation; baselines."""
    tested = probes.accuracies_in(summary, prefix=probes.TEST)
    record = summary if tested else summary["validation"]
    images, count = ("test", record.get("test_images")) if tested else ("held-out images", record.get("val_images"))
    n = f" (n = {count:,.0f})" if count else ""
    accuracies = tested or probes.accuracies_in(record)
    rows = [(f"{label} on {images}{n}", probes.accuracy_text(pct, count)) for label, pct in accuracies.items()]
    if not tested and summary.get("best"):
        best = probes.accuracies_in(summary["best"])
        rows += [(f"best {label}, epoch {summary['best']['epoch']:g}", f"{pct:.1f} %") for label, pct in best.items()]
    for prefix, what in probes.BASELINES.items():
        baselines = probes.accuracies_in(summary, prefix=prefix)
        rows += [(f"{label} of {what}", f"{pct:.1f} %") for label, pct in baselines.items()]
    return rows
