"""Figures that follow the page: matplotlib's SVG with its colors turned into CSS variables, so light and dark are one.

The file next to the page carries both palettes in a style of its own.
"""

import importlib
import io
import os
import re
import sys
import warnings
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastssl.errors import UserError

# Colors no figure uses otherwise; each becomes the variable next to it.
INK, MUTED, LINE, PAPER = "#010201", "#010202", "#010203", "#010204"
SERIES = tuple(f"#01030{i}" for i in range(8))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "card"} | {c: f"c{i}" for i, c in enumerate(SERIES)}
LIGHT = {"ink": "#1d2430", "muted": "#5c6675", "line": "#dfe4ea", "card": "#ffffff"} | {
    f"c{i}": c
    for i, c in enumerate(("#2f6fde", "#e0652b", "#1d9a72", "#8a5bd1", "#c9356f", "#a0781a", "#2596be", "#6b7280"))
}
DARK = {"ink": "#e8ecf2", "muted": "#9aa6b6", "line": "#2c3542", "card": "#171d26"} | {
    f"c{i}": c
    for i, c in enumerate(("#6ea2ff", "#ff9360", "#4fcf9f", "#b592f5", "#f272a3", "#d9b24c", "#63c4ea", "#9ca3af"))
}
SIZE_IN = (4.3, 2.75)


@dataclass(frozen=True)
class Figure:
    """One figure: what the page shows, and the same as files.

    Attributes:
        name: of its files, unique on the page.
        title, caption: plain text.
        body: HTML.
        files: name to bytes.
        columns: of the page's three that it takes; narrow figures next to a wide one are stacked.
    """

    name: str
    title: str
    caption: str
    body: str
    files: dict[str, bytes]
    columns: int = 1


@dataclass(frozen=True)
class Grid:
    """A table of plain texts.

    Attributes:
        heads: of the columns.
        rows: as many texts each.
        fold: shown when the reader opens it.
        what: its rows are, in the plural.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    fold: bool = False
    what: str = "rows"

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone, to be set to the right."""
        columns = range(len(self.heads))
        return [all(not row[i] or row[i][0].isdigit() or row[i] == "not reached" for row in self.rows) for i in columns]


@dataclass(frozen=True)
class Section:
    """A part of the page: figures, tables and one sentence for each figure left out."""

    title: str
    intro: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def import_matplotlib() -> None:
    """A notebook's MPLBACKEND, which its child processes inherit, need not exist here; figures are drawn without it."""
    inherited = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        importlib.import_module("matplotlib")
    finally:
        if inherited is not None:
            os.environ["MPLBACKEND"] = inherited


def require_matplotlib() -> None:
    """Raises UserError naming the extra when matplotlib is missing."""
    try:
        import_matplotlib()
    except ImportError as error:
        raise UserError(
            "Reports need matplotlib, which is not installed.", "Run `pip install 'fastssl-vision[report]'`."
        ) from error


def plot(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    size_in: tuple[float, float] = SIZE_IN,
) -> Figure:
    """A chart drawn by `draw(axes)`.

    Args:
        name: of its file, without .svg.
        title, caption: plain text.
        draw: fills one pair of matplotlib axes.
        size_in: width and height in inches of 72 px, scaled to the card.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(style(name)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=size_in, layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = themed(buffer.getvalue(), name, title)
    return Figure(name, title, caption, svg, {f"{name}.svg": standalone(svg).encode()})


def style(name: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.solid_capstyle": "round",
    }


def themed(svg: str, name: str, title: str) -> str:
    """The <svg> element alone: variables for colors, ids that no other figure has, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib writes a viewBox"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {box.group()} {namespaces} class="chart" role="img" aria-label="{escape(title)}">{rest}'


def variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in palette.items())


def palettes() -> str:
    """CSS: the light palette, and the dark one where the reader prefers it."""
    return f":root{{{variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"


def standalone(svg: str) -> str:
    """The same with its own style, on the card's color."""
    head, rest = svg.split(">", 1)
    text = "svg{background:var(--card)}text{font-family:system-ui,sans-serif!important}"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{palettes()}{text}</style>{rest}'


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
