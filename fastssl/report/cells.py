"""Values as people read them, in the page's tables and in the terminal's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastssl.probes import table as probes

FIGURES_SHOWN = 2  # of runs without labels


def changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value_text(value)}" for key, value in changes.items())


def clock(seconds: float | None) -> str:
    """Seconds as a person says them: 9 s, 9.4 min, 3.2 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


class MetricColumns:
    """The metrics that runs are distinguished by: last and best accuracy on held-out images, those on test, or figures.

    Args:
        rows: of `reading.listing` or of a sweep.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        held_out = [row.get("validation", {}) for row in rows]
        tested = dict.fromkeys(key for row in rows for key in row.get("test", {}))
        metrics = dict.fromkeys(row["metric"] for row in rows if row.get("metric") in row.get("validation", {}))
        self.metric = next(iter(metrics), None)
        figures = [probe for probe in probes.FIGURES if any(probe.key in numbers for numbers in held_out)]
        self.figures = [] if self.metric else [probe.key for probe in figures[:FIGURES_SHOWN]]
        first = {probe.key: key for probe in probes.ACCURACIES for key in reversed(tested) if probe.matches(key)}
        self.tested = list(first.values())
        self.several = len(metrics) > 1

    def names(self) -> list[str]:
        """Headings; a percentage on test says so."""
        label = "kNN" if self.several else probes.label_of(self.metric or "")
        first = [f"{label}, last (best)"] if self.metric else []
        return [*first, *map(probes.label_of, self.figures), *(f"test {probes.label_of(key)}" for key in self.tested)]

    def note(self) -> str:
        """What the numbers were measured on, in one line; empty without any."""
        if self.metric:
            return f"Held-out images: n = {self.counts('val_images')}; ± is half a 95 % interval, (best evaluation)."
        return f"Pretraining images: n = {self.counts('spectrum_images')}." if self.figures else ""

    def counts(self, key: str) -> str:
        numbers = sorted({int(row["validation"][key]) for row in self.rows if key in row.get("validation", {})})
        return " to ".join(f"{n:,}" for n in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "unknown"

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        held_out, tested = row.get("validation", {}), row.get("test", {})
        first = [last_and_best(row)] if self.metric else []
        figures = [probes.value_text(key, held_out.get(key)) for key in self.figures]
        return [*first, *figures, *(probes.value_text(key, tested.get(key)) for key in self.tested)]


def last_and_best(row: Mapping[str, Any]) -> str:
    """81.2 ± 1.5 % (81.9): what eval and export take by default with half its interval, and the best evaluation."""
    held_out = row.get("validation", {})
    last = held_out.get(row.get("metric"))
    return "" if last is None else f"{probes.accuracy_text(last, held_out.get('val_images'))} ({row['best_pct']:.1f})"
