"""docs/examples/shapes.ipynb runs from the first cell to the last, as a notebook would run it, and is on its page."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastssl.pretrained.load import load

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "examples" / "shapes.ipynb"
SIZE = "count, epochs = 6000, 4"
# What a notebook's kernel gives to rich: a shell of this name, and a `display` that shows text below the cell.
KERNEL = """
import builtins, sys, types
ZMQInteractiveShell = type("ZMQInteractiveShell", (), {})
builtins.get_ipython = ZMQInteractiveShell
ipython = types.ModuleType("IPython")
ipython.display = types.ModuleType("IPython.display")
ipython.display.display = lambda shown: print(shown.text, end="")
sys.modules |= {"IPython": ipython, "IPython.display": ipython.display}
"""


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    listed: list[dict[str, Any]] = notebook["cells"]
    return listed


def test_it_is_what_format_4_asks_for_and_holds_no_outputs() -> None:
    keys = {"markdown": {"cell_type", "id", "metadata", "source"}}
    keys["code"] = keys["markdown"] | {"execution_count", "outputs"}
    assert len({cell["id"] for cell in cells()}) == len(cells()) > 10
    for cell in cells():
        assert set(cell) == keys[cell["cell_type"]]
        assert isinstance(cell["source"], list)
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_its_cells_run_and_training_shows_its_progress(tmp_path: Path) -> None:
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert SIZE in code[0]
    script = "\n".join([KERNEL, *code, "print(features.shape, min(picture.size))"])
    (tmp_path / "notebook.py").write_text(script.replace(SIZE, "count, epochs = 300, 1"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-W", "always::ResourceWarning", "notebook.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("step ") for line in lines), "progress is shown without being asked for"
    backbone = load(tmp_path / "backbone.safetensors", device="cpu")
    assert lines[-1].startswith(f"(300, {backbone.features_dim}) ")
    assert lines[-2] == 'backbone = fastssl.load("backbone.safetensors", device="cpu").backbone'


def test_every_cell_is_on_the_page(monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import docs_hooks

    page = docs_hooks.on_page_markdown((ROOT / "docs" / "notebook.md").read_text(encoding="utf-8"))
    for cell in cells()[1:]:
        assert "".join(cell["source"]) in page
    assert page.count("\n# ") == 0
