"""What the documentation takes from the repository as it is built, so that it cannot be out of date.

`<!-- every error -->` becomes a table of every `UserError` in the code, `<!-- measured against peers -->` the rows of
bench/results/*.json that were measured with a peer, `<!-- the notebook -->` the cells of docs/examples/shapes.ipynb.
Reads the sources with ast alone: no torch, no import of fastssl.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("lightly", "torchvision", "kornia", "dali", "ffcv", "solo", "stable", "webdataset")
TOPICS = {  # the first that a module's path begins with
    "Recipe and command line": ("recipe/", "cli/"),
    "Converting images": ("data/sources/", "data/convert/", "data/beton/writer", "data/storage"),
    "Loading data": ("data/", "build/data"),
    "Networks, losses and starting weights": ("models/", "losses/", "build/"),
    "Training, saving and resuming": ("training/", "runs/"),
    "Evaluation": ("pretrained/evaluation/", "probes/"),
    "Using a backbone": ("pretrained/",),
    "Reports and benchmarks": ("",),
}


def on_config(config: Any, **_: Any) -> Any:
    """Called by mkdocs once: pages that the navigation does not name join the guides."""
    guides = next(part["Guides"] for part in config["nav"] if "Guides" in part)
    listed = str(config["nav"])
    guides += [page.name for page in sorted(Path(config["docs_dir"]).glob("*.md")) if page.name not in listed]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    for marker, text_of in (
        ("<!-- every error -->", errors_by_topic),
        ("<!-- measured against peers -->", peer_rows),
        ("<!-- the notebook -->", notebook),
    ):
        if marker in markdown:
            markdown = markdown.replace(marker, text_of())
    return markdown


def notebook(path: Path = ROOT / "docs" / "examples" / "shapes.ipynb") -> str:
    """The cells as text and code, without the title that the page has."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        text.removeprefix("# From images to a backbone\n\n")
        if cell["cell_type"] == "markdown"
        else f"```python\n{text}\n```"
        for text, cell in zip(parts, cells, strict=True)
    )


def errors_by_topic(package: Path = ROOT / "fastssl") -> str:
    """One section per topic, one row per error: what is wrong, and how to fix it."""
    rows: dict[str, list[tuple[str, str]]] = {topic: [] for topic in TOPICS}
    for name, what, fix in user_errors(package):
        topic = next(topic for topic, starts in TOPICS.items() if name.startswith(starts))
        rows[topic].append((what, fix))
    parts = []
    for topic, found in rows.items():
        if found:
            lines = [f"| {cell(what)} | {cell(fix)} |" for what, fix in sorted(set(found), key=str)]
            parts.append("\n".join([f"### {topic}", "", "| error | fix |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def user_errors(package: Path) -> Iterator[tuple[str, str, str]]:
    """(module, what, fix) of every `UserError(...)` below a package; what varies stands in <angle brackets>."""
    for path in sorted(package.rglob("*.py")):
        tree, seen = ast.parse(path.read_text(encoding="utf-8")), set[ast.AST]()
        for scope in [*(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), tree]:
            named = strings_of(scope)
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node not in seen:
                    seen.add(node)
                    what, fix = [*node.args, *(keyword.value for keyword in node.keywords)]
                    yield path.relative_to(package).as_posix(), words(what, named), words(fix, named)


def strings_of(scope: ast.AST) -> dict[str, ast.expr]:
    """The variables of a function or module that are assigned a text."""
    return {
        node.targets[0].id: node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.JoinedStr | ast.Constant | ast.BinOp | ast.IfExp)
    }


def words(node: ast.expr, named: dict[str, ast.expr]) -> str:
    """The text of a string expression, with <name> for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(words(part, {}) for part in parts)
        case (
            ast.FormattedValue(
                value=ast.Call(func=ast.Name(id="option"), args=[ast.Constant(value=name), *given])
            ) as part
        ):
            flags = [keyword.value.value for keyword in part.value.keywords]
            flag = "--" + (flags or [name])[0].replace("_", "-")
            return " ".join([flag, *(words(value, {}) for value in given if ast.unparse(value) != "True")])
        case ast.FormattedValue(value=value):
            return f"<{variable(value)}>"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return words(left, named) + words(right, named)
        case ast.IfExp(body=body, orelse=other):
            return words(body, named) or words(other, named)
        case ast.Name(id=name) if name in named:
            return words(named[name], {})
    return f"<{variable(node)}>"


def variable(node: ast.expr) -> str:
    """A short name of what is filled in: the last attribute or variable of an expression."""
    if isinstance(node, ast.Call):
        node = node.args[0] if node.args else node.func
    named = (getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node))
    return next((name for name in named if name), "...").replace("_", " ").strip()


def cell(text: str) -> str:
    for mark, shown in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("*", "&#42;"),
        ("_", "&#95;"),
        ("\n", " "),
    ):
        text = text.replace(mark, shown)
    return text.replace("[", "&#91;").replace("`", "&#96;")


def peer_rows(results: Path = ROOT / "bench" / "results") -> str:
    """One table per record that has a row of a peer; a sentence when there is none."""
    tables = []
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = record.get("rows", []) if isinstance(record, dict) else []
        if any(peer in str(row.get("impl", "")).lower() for row in rows for peer in PEERS):
            tables.append(table(record, rows))
    return "\n\n".join(tables) or "No record in `bench/results/` has a row of a peer yet."


def table(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    hardware = record.get("hardware", {})
    machine = ", ".join(map(str, [*hardware.get("gpus", []), hardware.get("cpu"), f"{hardware.get('cores')} cores"]))
    lines = [f"**{record.get('bench')}**, {machine}, {str(record.get('date'))[:10]}:", ""]
    lines += ["| library | work | metric | median | min | max | n |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        work = ", ".join(f"{key} {value}" for key, value in row.get("work", {}).items())
        figures = [figure(row.get(key)) for key in ("median", "min", "max")]
        cells = [cell(str(row.get("impl"))), cell(work), cell(str(row.get("metric"))), *figures, str(row.get("n"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not reached"
