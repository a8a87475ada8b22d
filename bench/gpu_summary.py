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
    """One line per stage."""
    return "\n".join(f"{o['name']:18} {o['state']:9} {o['seconds']:7.0f} s  {o['reason']}".rstrip() for o in outcomes)


def page(suite: dict[str, Any], records: dict[str, dict[str, Any]]) -> str:
    """A self-contained page.

    Args:
        suite: the record of suite.json.
        records: each stage's record by its name.
    """
    gpus = ", ".join(suite["hardware"]["gpus"]) or "no GPU"
    dry = "<p><b>A dry run at tiny size: its figures say nothing about speed.</b></p>" if suite["dry"] else ""
    stages = "".join(
        f'<tr><td>{escape(stage["title"])}</td><td class="{stage["state"].split()[0]}">{stage["state"]}</td>'
        f'<td class="n">{stage["seconds"]:.0f} s</td><td>{escape(stage["reason"])}</td></tr>'
        for stage in suite["stages"]
    )
    parts = "".join(section(name, record) for name, record in records.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>GPU suite</title><style>{STYLE}</style><h1>GPU suite</h1>{dry}"
        f"<p>{escape(gpus)}, {escape(suite['hardware']['cpu'])}; torch {escape(suite['versions'].get('torch', '?'))}; "
        f"commit {escape(str(suite['commit']))}; {escape(suite['date'])}</p><table>{stages}</table>{parts}</html>\n"
    )


def section(name: str, record: dict[str, Any]) -> str:
    """A stage's sentences and rows."""
    sentences = [*record.get("notes", []), *(speed_up(ratio) for ratio in record.get("speed_ups", []))]
    if "bottleneck" in record:
        sentences.append(record["bottleneck"]["text"])
    lines = "".join(
        f"<tr><td>{escape(row['impl'])}</td><td>{escape(work(row['work']))}</td><td>{escape(row['metric'])}</td>"
        + "".join(f'<td class="n">{figure(row[key])}</td>' for key in ("median", "min", "max", "n"))
        + "</tr>"
        for row in record["rows"]
    )
    head = "<tr><th>implementation<th>work<th>metric<th>median<th>min<th>max<th>n</tr>"
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<h2>{escape(name)}</h2>{text}<table>{head}{lines}</table>"


def speed_up(ratio: dict[str, Any]) -> str:
    value = "unknown" if ratio["ratio"] is None else f"{ratio['bound']} {ratio['ratio']:.2f}"
    interval = "" if ratio["low"] is None else f" (95 % {ratio['low']:.2f} to {ratio['high']:.2f})"
    return (
        f"{ratio['recipe']} against {ratio['against']}, {ratio['metric']} {ratio['target_pct']:g} %: {value}{interval}"
    )


def work(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def figure(value: float | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
