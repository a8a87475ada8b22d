"""The page itself: a header with the main figures, a table of runs, and cards. No script and no request.

The template is page.html, its style page.css; every text in it is escaped.
"""

import importlib.resources
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fastssl.probes import table as probes
from fastssl.recipe.presets import view_table
from fastssl.report.cells import MetricColumns, changes_text, clock
from fastssl.report.figure import Grid, Section, palettes
from fastssl.report.inputs import LabeledRun, Record, plain
from fastssl.runs.reading import entry
from fastssl.version import __version__

# Nothing may be fetched, and nothing can run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Tile:
    """One main figure: what it is, its number and unit, and a small line below, such as an interval."""

    name: str
    number: str
    unit: str = ""
    note: str = ""


def html(
    runs: Sequence[LabeledRun],
    records: Sequence[tuple[str, Record]],
    sections: Sequence[Section],
    *,
    reload_s: float | None = None,
) -> str:
    """The whole document; with `reload_s` browsers load it again after so many seconds."""
    files = importlib.resources.files("fastssl.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    places: list[Any] = [run.environment for run in runs] + [record.about for _, record in records]
    return template.render(
        title=plain(runs[0].recipe.name if len({run.recipe.name for run in runs}) == 1 else "fastssl report"),
        lead=recipe_line(runs[0]) if len(runs) == 1 else counts_line(runs, records),
        tiles=run_tiles(runs[0]) if len(runs) == 1 else runs_tiles(runs),
        runs=runs_grid(runs) if len(runs) > 1 else None,
        sections=sections,
        machines=[line for line in dict.fromkeys(machine(place) for place in places) if line],
        reload_s=None if reload_s is None else f"{reload_s:g}",
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        policy=POLICY,
        style=palettes() + files.joinpath("page.css").read_text(encoding="utf-8"),
        version=__version__,
    )


def counts_line(runs: Sequence[LabeledRun], records: Sequence[tuple[str, Record]]) -> str:
    count = [f"{len(runs)} runs"] if runs else []
    count += [f"{len(records)} benchmark record" + ("s" if len(records) != 1 else "")] if records else []
    return " and ".join(count)


def recipe_line(run: LabeledRun) -> str:
    recipe = run.recipe
    views, widths = len(view_table(recipe.augment)), recipe.model.projector
    dims = f", D = {widths[-1]}" if widths else ""
    epochs = "1 epoch" if recipe.train.epochs == 1 else f"{recipe.train.epochs} epochs"
    about = f"{run.loss_label}{dims}, {views} views, {plain(recipe.model.backbone)}, {epochs}"
    date = run.environment.get("date")
    when = f", {plain(date[:10])}" if isinstance(date, str) else ""
    return f"{about}, seed {recipe.seed}, {run.state}{when}"


def run_tiles(run: LabeledRun) -> list[Tile]:
    """One run's main figures: accuracies with their interval and number of images, or figures without labels."""
    main = entry(run)
    tiles = [
        accuracy_tile(f"{probes.label_of(key, main['test'])} on test", value, main["test"].get("images"))
        for key, value in main["test"].items()
        if is_accuracy(key)
    ]
    held_out, metric = main["validation"], main["metric"]
    if metric in held_out:
        name = f"{probes.label_of(metric, held_out)}, held-out"
        best = f"best {main['best_pct']:.1f} % at epoch {main['best_epoch']:g}"
        tiles.append(accuracy_tile(name, held_out[metric], held_out.get("val_images"), more=best))
    tiles += figure_tiles(held_out)
    if main["train_s"]:
        number, unit = clock(main["train_s"]).split(" ")
        tiles.append(Tile("training", number, unit))
    if main["views_per_s"]:
        tiles.append(Tile("speed", f"{main['views_per_s']:,.0f}", "views/s"))
    if run.steps:
        views = run.steps[-1]["views"]
        number, unit = (f"{views / 1e6:.3g}", "million") if views >= 1e6 else (f"{views:,.0f}", "")
        tiles.append(Tile("views forwarded", number, unit))
    return tiles


def is_accuracy(key: str) -> bool:
    probe = probes.probe_of(key)
    return probe in probes.ACCURACIES


def accuracy_tile(name: str, value: float, images: float | None, *, more: str = "") -> Tile:
    """An accuracy with half its 95 % interval and what it was measured on."""
    notes = [f"{probes.accuracy_text(value, images)}, n = {images:,.0f}".split(" ", 1)[1]] if images else []
    return Tile(name, f"{value:.1f}", "%", "; ".join([*notes, *([more] if more else [])]))


def figure_tiles(metrics: dict[str, float]) -> list[Tile]:
    """The first figure that needs no label."""
    key = next((probe.key for probe in probes.FIGURES if probe.key in metrics), None)
    if key is None:
        return []
    parts = [f"of {metrics['dims']:.0f} dimensions"] if "dims" in metrics else []
    parts += [f"n = {metrics['spectrum_images']:,.0f}"] if "spectrum_images" in metrics else []
    return [Tile(probes.label_of(key), probes.value_text(key, metrics[key]), "", ", ".join(parts))]


def runs_tiles(runs: Sequence[LabeledRun]) -> list[Tile]:
    """The best of several runs on held-out images, and how much was trained."""
    entries = [entry(run) for run in runs]
    tiles = [Tile("runs", str(len(runs)))] if runs else []
    measured = [(main["validation"][main["metric"]], main) for main in entries if main["metric"] in main["validation"]]
    if measured:
        value, main = max(measured, key=lambda pair: pair[0])
        name = f"highest {probes.label_of(main['metric'], main['validation'])}, held-out"
        tiles.append(accuracy_tile(name, value, main["validation"].get("val_images")))
    spent_s = sum(main["train_s"] for main in entries)
    return [*tiles, Tile("training in all", *clock(spent_s).split(" "))] if spent_s else tiles


def runs_grid(runs: Sequence[LabeledRun]) -> Grid:
    """Every run with the metrics that any of them has."""
    entries = [entry(run) for run in runs]
    metrics, rows = MetricColumns(entries), []
    for run, main in zip(runs, entries, strict=True):
        speed = f"{main['views_per_s']:,.0f}" if main["views_per_s"] else ""
        remark = run.failure if run.state == "failed" and run.failure else changes_text(run.differences)
        progress = f"{main['epoch']:.3g}/{main['epochs']}"
        place, cost = (run.label, run.state, progress), (speed, clock(main["train_s"]))
        rows.append([*place, *metrics.cells(main), *cost, plain(remark, 300)])
    return Grid(["run", "state", "epochs", *metrics.names(), "views/s", "time", "differs in"], rows)


def machine(environment: dict[str, Any]) -> str:
    """Hardware, versions and commit in one line."""
    hardware, versions = environment.get("hardware"), environment.get("versions")
    parts = []
    if isinstance(hardware, dict):
        gpus = hardware.get("gpus")
        parts += [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
        cores = hardware.get("cores")
        parts.append(f"{cores} core{'' if cores == 1 else 's'} of {hardware.get('cpu')}")
    if isinstance(versions, dict):
        parts += [f"{name} {versions[name]}" for name in ("torch", "fastssl-vision", "python") if name in versions]
    if environment.get("commit"):
        parts.append(f"commit {str(environment['commit'])[:10]}")
    return plain(", ".join(parts), 300)
