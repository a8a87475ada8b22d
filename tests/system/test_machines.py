"""Other people's machines: only a temporary folder can be written to, a notebook's environment is inherited."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastssl
from fastssl.runs import numba_cache

PACKAGE = Path(fastssl.__file__).parent


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with a copy of the package and an empty home, none of which can be written to."""
    shutil.copytree(PACKAGE, tmp_path / "fastssl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    folders = [Path(folder) for folder, _, _ in os.walk(tmp_path)]
    for folder in folders:
        folder.chmod(0o555)
    yield tmp_path
    for folder in folders:
        folder.chmod(0o755)


def as_a_guest(script: str, *words: str, site: Path) -> "subprocess.CompletedProcess[str]":
    """Python where permissions hold; root's process gives up its right to pass them over."""
    drop = "-dac_override,-dac_read_search"
    guest = ["setpriv", f"--inh-caps={drop}", f"--bounding-set={drop}"] if os.geteuid() == 0 else []
    clean = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    return subprocess.run(
        [*guest, sys.executable, "-c", script, *words],
        env=clean | {"PYTHONPATH": str(site), "HOME": str(site / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv")
def test_kernels_compile_where_neither_installation_nor_home_can_be_written_to(read_only: Path) -> None:
    script = (
        "import fastssl, json, os\n"
        "from fastssl.data.sources import open_source\n"
        "source = open_source('shapes', count=2, side_px=8)\n"
        "print(json.dumps([fastssl.__file__, os.environ['NUMBA_CACHE_DIR'], len(source)]))\n"
    )
    done = as_a_guest(script, site=read_only)
    assert done.returncode == 0, done.stderr[-2000:]
    file, cache, count = json.loads(done.stdout)
    assert file == str(read_only / "fastssl" / "__init__.py")
    assert count == 2
    assert not Path(cache).exists(), "a temporary cache ends with its process"


def test_a_cache_is_not_moved_without_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert numba_cache.provide(tmp_path) is None
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/else/where")
    assert numba_cache.provide(Path("/proc")) is None
    assert os.environ["NUMBA_CACHE_DIR"] == "/else/where"


def test_a_notebooks_backend_that_is_not_installed_stops_no_figure() -> None:
    script = (
        "import os\n"
        "from fastssl.report.figure import require_matplotlib\n"
        "require_matplotlib()\n"
        "from matplotlib.figure import Figure\n"
        "import io\n"
        "Figure().savefig(io.BytesIO(), format='svg')\n"
        "print(os.environ['MPLBACKEND'])\n"
    )
    environment = {**os.environ, "MPLBACKEND": "no_such_backend"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "no_such_backend"


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv")
def test_eval_of_a_run_that_cannot_be_written_to_prints_its_result_first(
    finished_run: Path, read_only: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("read_only") / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "features", ignore_errors=True)
    recipe = run / "recipe.yaml"  # with the torch backend: no kernels to compile for this installation
    recipe.write_text(recipe.read_text().replace("backend: auto", "backend: torch"))
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    folders = [Path(folder) for folder, _, _ in os.walk(run)]
    for folder in folders:
        folder.chmod(0o555)
    script = "import sys\nfrom fastssl.cli import main\nmain()\n"
    done = as_a_guest(script, "eval", str(run), "--probe", "knn", "--json", site=read_only)
    for folder in folders:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["rows"]
    assert done.stderr.splitlines()[-1].startswith("Warning: The result and its features are not kept in")
    assert not (run / "evaluations.jsonl").exists()
