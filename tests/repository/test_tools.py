"""The shell tools: they parse, and offline_wheels.sh says what it would do."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def offline_wheels(*words: str, cwd: Path = TOOLS.parent) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TOOLS / "offline_wheels.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.mark.parametrize("script", sorted(TOOLS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_names_every_command_and_does_none(tmp_path: Path) -> None:
    folder = "my wheels"  # where the caller stands, not in the repository
    done = offline_wheels("--dry-run", "--extras", "ffcv,report", "--python", "python3.11", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert ["bash", str(TOOLS / "build_ffcv_wheel.sh"), "python3.11", folder] in commands
    download = next(words for words in commands if "wheel" in words)
    assert download[:4] == ["python3.11", "-m", "pip", "wheel"]
    assert download[download.index("--wheel-dir") + 1] == folder
    assert download[-1] == f"{TOOLS.parent}[ffcv,report]"
    assert download[download.index("--constraint") + 1] == str(TOOLS.parent / "constraints.txt")
    assert commands[-1][-1] == "fastssl-vision[ffcv,report]"
    assert commands[-1][commands[-1].index("--find-links") + 1] == "."
    assert not list(tmp_path.iterdir())


def test_ffcv_is_built_only_when_asked_for() -> None:
    assert "build_ffcv_wheel" not in offline_wheels("--dry-run").stdout


@pytest.mark.parametrize("words", [("--extras",), ("--wrong",), ("a", "b")])
def test_wrong_words_are_answered_with_the_usage(words: tuple[str, ...]) -> None:
    done = offline_wheels(*words)
    assert done.returncode == 2
    assert "offline_wheels.sh [--dry-run]" in done.stderr


def test_the_dockerfile_names_files_extras_and_a_python_that_exist() -> None:
    root = TOOLS.parent
    text = (root / "Dockerfile").read_text().replace("\\\n", " ")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"^FROM python:(3\.\d+)-slim", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert all((root / name).exists() for name in line.split()[:-1]), line
    assert re.search(r'^ENTRYPOINT \["fastssl"\]$', text, re.MULTILINE)
    assert "fastssl" in project["scripts"]
    needed = re.search(r"^missing=.*?^if", (TOOLS / "setup.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert needed
    libraries = set(re.findall(r"missing\+=\((lib\S+|g\+\+|pkg-config)\)", needed[0]))
    assert libraries <= set(text.split())
