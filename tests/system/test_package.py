"""What is published: an sdist, a wheel made from it, and that wheel at work in a folder away from the repository.

The wheel is installed without its dependencies, which the tests' own environment has; tools/check_wheel.sh installs it
into an empty environment.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "data.count=96", "data.test_count=32", "data.val_count=24", "data.side_px=16", "data.batch_size=24",
    "augment.side_px=8", "augment.backend=torch", "model.width=0.25", "model.projector=[16]",
    "train.epochs=1", "evaluate.linear_epochs=2",
)  # fmt: skip

EVERY_HELP = """
import sys
from fastssl.cli import main
for verb in sys.argv[1:]:
    sys.argv = ["fastssl", verb, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, verb
"""


def run(*words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from what is in it."""
    for name in ("build", "hatchling"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which only the wheel's own files are fastssl."""
    place = tmp_path_factory.mktemp("site")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(place), str(built[1])]
    run(sys.executable, "-m", "pip", *words, cwd=place)
    return {"PYTHONPATH": str(place)}


def test_the_wheel_holds_the_package_and_the_recipes(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "fastssl").rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {"fastssl/py.typed", "fastssl/report/page.css", "fastssl/cli/recipe.py"} <= wanted
    assert held == wanted | {f"fastssl/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}


def test_the_sdist_holds_what_tests_and_documents_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tests/conftest.py", "docs/use.md"):
        assert name in held
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= held
    assert not [name for name in held if name.startswith(("data/", "runs/", ".venv/"))]


def test_every_verb_is_there_and_a_shipped_recipe_trains(installed: dict[str, str], tmp_path: Path) -> None:
    python = [sys.executable, "-P"]

    def fastssl(*words: str) -> dict[str, Any]:
        out = run(*python, "-m", "fastssl", *words, "--json", cwd=tmp_path, env=installed)
        record: dict[str, Any] = json.loads(out.splitlines()[-1])
        return record

    installed_at = run(
        *python,
        "-c",
        "import fastssl, fastssl.augment.cpu.backend; print(fastssl.__file__)",
        cwd=tmp_path,
        env=installed,
    )
    assert Path(installed_at.strip()).is_relative_to(installed["PYTHONPATH"])
    assert run(*python, "-c", EVERY_HELP, *VERBS, cwd=tmp_path, env=installed).count("Usage:") == len(VERBS)
    assert set(fastssl("recipes")["recipes"]) == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    summary = fastssl("train", "quickstart", *(word for change in TINY for word in ("-s", change)))
    assert 0 <= summary["test_knn20_pct"] <= 100
    assert (tmp_path / "runs" / "quickstart" / "summary.json").exists()
    assert fastssl("recipe", "show", "runs/quickstart")["recipe"]["data"]["count"] == 96
    (row,) = fastssl("runs")["runs"]
    assert row["state"] == "done"
