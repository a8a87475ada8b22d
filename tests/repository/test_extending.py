"""docs/extending.md: every diff applies to a copy of the repository, touches as many files as promised, and works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {"loss": 4, "operation": 7, "source": 2, "metric": 2, "schedule": 2}
TESTS = {  # what the package's own tests find out about the change, without a line of its own
    "loss": ("tests/losses/test_losses.py", "table and (spectral or schema)", 3),
    "schedule": ("tests/build/test_optim.py", "linear", 1),
}


def block(kind: str, change: str, language: str) -> str:
    match = re.search(rf"<!-- {kind}: {change} -->\n```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert match, f"no {kind} of {change}"
    return match[1]


def run(*command: str, cwd: Path, stdin: str | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(cwd), "NUMBA_CACHE_DIR": str(cwd / ".numba")}
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the package and its tests with one of the page's diffs applied."""
    if shutil.which("git") is None:
        pytest.skip("git applies the diffs, and it is not installed")
    for name in ("fastssl", "tests", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    run("git", "apply", "--verbose", "-", cwd=tmp_path, stdin=block("change", request.param, "diff"))
    return tmp_path


def test_every_change_of_the_page_is_tried() -> None:
    assert re.findall(r"<!-- change: (\w+) -->", PAGE) == list(FILES)


@pytest.mark.parametrize("change", FILES)
def test_a_change_costs_as_many_files_as_the_page_promises(change: str) -> None:
    assert len(re.findall(r"^\+\+\+ b/", block("change", change, "diff"), re.MULTILINE)) == FILES[change]
    label = {
        "operation": "an operation on all backends",
        "source": "a source of images",
        "metric": "a metric of features",
    }.get(change, f"a {change}")
    assert f"| {label} | {FILES[change]}: " in PAGE


@pytest.mark.parametrize(("changed", "change"), [(name, name) for name in FILES], indirect=["changed"], ids=list(FILES))
def test_the_check_of_every_change_passes(changed: Path, change: str) -> None:
    run(sys.executable, "-W", "error", "-c", block("check", change, "python"), cwd=changed)


@pytest.mark.parametrize(("changed", "change"), [(name, name) for name in TESTS], indirect=["changed"], ids=list(TESTS))
def test_the_packages_own_tests_try_the_change(changed: Path, change: str) -> None:
    path, words, count = TESTS[change]
    summary = run(sys.executable, "-m", "pytest", path, "-k", words, "-p", "no:cacheprovider", "-v", cwd=changed)
    assert f" {count} passed" in summary


def test_a_change_that_is_not_there_does_not_work() -> None:
    done = subprocess.run([sys.executable, "-c", block("check", "schedule", "python")], cwd=ROOT, capture_output=True)
    assert b"optim.schedule" in done.stderr
