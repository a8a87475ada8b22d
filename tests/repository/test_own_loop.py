"""The scripts of docs/own-loop.md run as they stand, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def run(script: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-W", "error::UserWarning:fastssl", str(EXAMPLES / script), *map(str, arguments)]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # peers lie apart
    done = subprocess.run(command, cwd=cwd, env=found, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "package"), [("own_loop.py", ""), ("lightning_loop.py", "lightning"), ("lightly_loss.py", "lightly")]
)
def test_a_loop_runs(script: str, package: str, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert "loss" in run(script, tiny_data[0], 1, cwd=tmp_path)


def test_fine_tuning_learns_the_labels(tiny_run: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    last = run("finetune.py", tiny_run, tiny_data[0], 70, cwd=tmp_path).splitlines()[-1]
    assert float(last.split("accuracy ")[1].removesuffix(" %")) > 15  # of ten classes; 400 guesses end below 15 %


def test_every_script_is_on_the_page() -> None:
    page = (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(
        line.split("/")[1].rstrip('"') for line in page.splitlines() if line.startswith("--8<--")
    )
