"""The repository keeps its own rules: lint, types, import direction, and nothing that names a machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from checkout import git

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*words: str) -> None:
    if not Path(words[0]).exists():
        pytest.skip(f"{Path(words[0]).name} is not installed (pip install 'fastssl-vision[dev]')")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_ruff() -> None:
    run(str(BIN / "ruff"), "check", ".")
    run(str(BIN / "ruff"), "format", "--check", ".")


def test_mypy() -> None:
    run(str(BIN / "mypy"))


def test_import_direction() -> None:
    run(str(BIN / "lint-imports"))


def tracked() -> list[Path]:
    return [ROOT / name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine() -> None:
    # Written in parts, so that this file does not find itself.
    forbidden = re.compile("/" + "work/|/" + "root/|/home/[a-z]|files\\.pythonhosted|" + "pypi\\." + "org/simple")
    found = []
    for path in tracked():
        if path.stat().st_size < 1 << 20:
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in forbidden.finditer(text)]
    assert not found


def test_files_stay_small_enough_to_read() -> None:
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / "fastssl").rglob("*.py")}
    assert not {name: lines for name, lines in sizes.items() if lines > 400}


def test_the_real_images_are_not_in_the_repository() -> None:
    assert not [p for p in tracked() if p.suffix in (".xz", ".beton") and p.stat().st_size > 1 << 20]


def test_continuous_integration_runs_make_test_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    supported = [name.split()[-1] for name in classifiers if re.search(r":: 3\.\d+$", name)]
    assert job["strategy"]["matrix"]["python"] == supported
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]


def test_the_slow_tests_exist_and_leave_a_fast_one_in_every_other_module() -> None:
    slow = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split()
    names: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests = re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        names[path.relative_to(ROOT).as_posix()] = set(tests)
    known = {*names, *(f"{path}::{name}" for path, tests in names.items() for name in tests)}
    assert not set(slow) - known
    assert not [path for path in names if path not in slow and {f"{path}::{name}" for name in names[path]} <= set(slow)]
