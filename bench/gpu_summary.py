"""The page and the lines that bench/gpu_suite.py ends with: what ran, what did not and why, and every figure."""

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.failed { color: #c33 } .stopped, .left { color: #b70 }
"""


def text(outcomes: list[dict[str, Any]]) -> str:
    """One line a stage."""
    return "\n".join(
        f"{one['name']:14} {one['state']:9} {one['seconds']:7.0f} s  {one['reason']}".rstrip() for one in outcomes
    )


def page(suite: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """A self-contained page.

    Args:
        suite: the record of suite.json.
        results: each stage's record by its name.
    """
    gpus = ", ".join(suite["hardware"]["gpus"]) or "no GPU"
    dry = "<p><b>A dry run at tiny size: its figures say nothing about speed.</b></p>" if suite["dry"] else ""
    stages = "".join(
        f'<tr><td>{escape(one["title"])}</td><td class="{one["state"].split()[0]}">{one["state"]}</td>'
        f'<td class="n">{one["seconds"]:.0f} s</td><td>{escape(one["reason"])}</td></tr>'
        for one in suite["stages"]
    )
    parts = "".join(section(name, made) for name, made in results.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>GPU suite</title><style>{STYLE}</style><h1>GPU suite</h1>{dry}"
        f"<p>{escape(gpus)}, {escape(suite['hardware']['cpu'])}; torch {escape(suite['versions'].get('torch', '?'))}; "
        f"commit {escape(str(suite['commit']))}; {escape(suite['date'])}</p><table>{stages}</table>{parts}</html>\n"
    )


def section(name: str, made: dict[str, Any]) -> str:
    """A stage's sentences and rows."""
    said = [*made.get("notes", []), *(speed_up(one) for one in made.get("speed_ups", []))]
    if "bottleneck" in made:
        said.append(made["bottleneck"]["text"])
    lines = "".join(
        f"<tr><td>{escape(one['impl'])}</td><td>{escape(work(one['work']))}</td><td>{escape(one['metric'])}</td>"
        + "".join(f'<td class="n">{figure(one[key])}</td>' for key in ("median", "min", "max", "n"))
        + "</tr>"
        for one in made["rows"]
    )
    head = "<tr><th>what<th>work<th>metric<th>median<th>min<th>max<th>n</tr>"
    return f"<h2>{escape(name)}</h2>" + "".join(f"<p>{escape(s)}</p>" for s in said) + f"<table>{head}{lines}</table>"


def speed_up(one: dict[str, Any]) -> str:
    ratio = "unknown" if one["ratio"] is None else f"{one['bound']} {one['ratio']:.2f}"
    interval = "" if one["low"] is None else f" (95 % {one['low']:.2f} to {one['high']:.2f})"
    return f"{one['recipe']} against {one['against']}, {one['metric']} {one['target_pct']:g} %: {ratio}{interval}"


def work(made: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in made.items())


def figure(value: float | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
