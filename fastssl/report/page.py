"""The page itself: a header with the main figures, a table of runs, and cards. No script and no request."""

import importlib.resources
from collections.abc import Sequence
from html import escape
from typing import Any

from fastssl.recipe.presets import view_table
from fastssl.report.cells import changes_text, clock, percent
from fastssl.report.figure import Figure, Section, palettes
from fastssl.report.inputs import LabeledRun, Record, plain
from fastssl.runs.reading import entry
from fastssl.version import __version__

# Nothing may be fetched, and nothing can run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html(runs: Sequence[LabeledRun], records: Sequence[tuple[str, Record]], sections: Sequence[Section]) -> str:
    """The whole document."""
    css = importlib.resources.files("fastssl.report").joinpath("page.css").read_text(encoding="utf-8")
    title = plain(runs[0].recipe.name if len({run.recipe.name for run in runs}) == 1 else "fastssl report")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{palettes()}{css}</style></head>"
    )
    body = header(title, runs, records)
    if len(runs) > 1:
        body += f"<section><h2>Runs</h2>{runs_table(runs)}</section>"
    body += "".join(section_html(section) for section in sections)
    body += footer(runs, records)
    return f"{head}<body><main>{body}</main></body></html>\n"


def header(title: str, runs: Sequence[LabeledRun], records: Sequence[tuple[str, Record]]) -> str:
    """Title, one line on what this is, and the main figures."""
    if len(runs) == 1:
        lead = recipe_line(runs[0])
    else:
        count = [f"{len(runs)} runs"] if runs else []
        count += [f"{len(records)} benchmark record" + ("s" if len(records) != 1 else "")] if records else []
        lead = " and ".join(count)
    tiles = run_tiles(runs[0]) if len(runs) == 1 else runs_tiles(runs)
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(unit)}</small></dd></div>"
        for name, value, unit in tiles
    )
    return (
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p>" + (f"<dl>{items}</dl>" if items else "") + "</header>"
    )


def recipe_line(run: LabeledRun) -> str:
    recipe = run.recipe
    views, widths = len(view_table(recipe.augment)), recipe.model.projector
    loss = {"barlow_twins": "Barlow Twins", "vicreg": "VICReg"}[recipe.loss.name]
    dims = f", D = {widths[-1]}" if widths else ""
    epochs = "1 epoch" if recipe.train.epochs == 1 else f"{recipe.train.epochs} epochs"
    return f"{loss}{dims}, {views} views, {plain(recipe.model.backbone)}, {epochs}, seed {recipe.seed}, {run.state}"


def run_tiles(run: LabeledRun) -> list[tuple[str, str, str]]:
    """(name, number, unit) of one run's main figures."""
    main = entry(run)
    named = (
        ("kNN on test", main["test_knn_pct"]),
        ("linear probe on test", main["test_linear_pct"]),
        ("best held-out kNN", main["best_val_pct"]),
    )
    tiles = [(name, f"{value:.1f}", "%") for name, value in named if value is not None]
    if main["train_s"]:
        number, unit = clock(main["train_s"]).split(" ")
        tiles.append(("training", number, unit))
    if main["views_per_s"]:
        tiles.append(("speed", f"{main['views_per_s']:,.0f}", "views/s"))
    if run.steps:
        tiles.append(("views forwarded", f"{run.steps[-1]['views'] / 1e6:.3g}", "million"))
    return tiles


def runs_tiles(runs: Sequence[LabeledRun]) -> list[tuple[str, str, str]]:
    """The best of several runs, and how much was trained."""
    entries = [entry(run) for run in runs]
    tiles = [("runs", str(len(runs)), "")] if runs else []
    for name, key in (("best kNN on test", "test_knn_pct"), ("best linear on test", "test_linear_pct")):
        values = [one[key] for one in entries if one[key] is not None]
        tiles += [(name, f"{max(values):.1f}", "%")] if values else []
    spent = sum(one["train_s"] for one in entries)
    return tiles + ([("training in all", *clock(spent).split(" "))] if spent else [])  # type: ignore[list-item]


def runs_table(runs: Sequence[LabeledRun]) -> str:
    rows = []
    for run in runs:
        main = entry(run)
        speed = f"{main['views_per_s']:,.0f}" if main["views_per_s"] else ""
        numbers = [percent(main[key]) for key in ("best_val_pct", "test_knn_pct", "test_linear_pct")]
        said = run.failure if run.state == "failed" and run.failure else changes_text(run.differences)
        progress = f"{main['epoch']:.3g}/{main['epochs']}"
        rows.append([run.label, run.state, progress, *numbers, speed, clock(main["train_s"]), plain(said, 300)])
    heads = ["run", "state", "epochs", "best kNN", "test kNN", "linear", "views/s", "time", "differs in"]
    return table(heads, rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, fold: bool = False) -> str:
    """A table that scrolls sideways by itself; folded away when asked."""
    numeric = [
        all(not row[i] or row[i][0].isdigit() or row[i] == "not reached" for row in rows) for i in range(len(heads))
    ]
    sides = [' class="n"' if one else "" for one in numeric]
    top = "".join(f"<th{side}>{escape(head)}</th>" for head, side in zip(heads, sides, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    text = f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
    return f"<details><summary>All {len(rows)} rows</summary>{text}</details>" if fold else text


def section_html(section: Section) -> str:
    intro = f"<p>{escape(section.intro)}</p>" if section.intro else ""
    cards = "".join(card(figure) for figure in section.figures)
    left_out = "".join(f"<li>{escape(note)}</li>" for note in section.skipped)
    notes = f'<ul class="notes">{left_out}</ul>' if left_out else ""
    cards = f'<div class="cards">{cards}</div>' if cards else ""
    return f"<section><h2>{escape(section.title)}</h2>{intro}{cards}{''.join(section.tables)}{notes}</section>"


def card(figure: Figure) -> str:
    wide = " wide" if figure.wide else ""
    return (
        f'<figure class="card{wide}" id="{escape(figure.name)}"><h3>{escape(figure.title)}</h3>{figure.body}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def footer(runs: Sequence[LabeledRun], records: Sequence[tuple[str, Record]]) -> str:
    """Machines and versions, one line for each that differs, and what made the page."""
    places: list[Any] = [run.environment for run in runs] + [record.about for _, record in records]
    lines = dict.fromkeys(machine(place) for place in places)
    said = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
    return f"<footer><ul>{said}</ul><p>Made by fastssl {__version__}.</p></footer>"


def machine(environment: dict[str, Any]) -> str:
    """Hardware, versions and commit in one line."""
    hardware, versions = environment.get("hardware"), environment.get("versions")
    parts = []
    if isinstance(hardware, dict):
        gpus = hardware.get("gpus")
        parts += [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
        parts.append(f"{hardware.get('cores')} cores of {hardware.get('cpu')}")
    if isinstance(versions, dict):
        parts += [f"{name} {versions[name]}" for name in ("torch", "fastssl-vision", "python") if name in versions]
    if environment.get("commit"):
        parts.append(f"commit {str(environment['commit'])[:10]}")
    return plain(", ".join(parts), 300)
