"""`git(...)`: of the checkout that the tests lie in; without one, or without git, a test is skipped."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:
        pytest.skip("git is not installed")
    if done.returncode:  # no checkout, or one that belongs to another user
        pytest.skip(f"git refuses: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout
