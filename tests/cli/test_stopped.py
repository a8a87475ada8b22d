"""Ctrl-C: two lines on what remains and how to go on, exit code 130, and nothing half-written; real signals."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastssl.cli.stopped import command, same_command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")

# A process that sends itself SIGINT when a verb begins to import torch, or, for convert, to read images.
AT_WORK = """
import importlib.abc, os, signal, sys
class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "fastssl.data.sources.tables"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["fastssl", *sys.argv[1:]]
from fastssl.cli import main
main()
"""
VERBS = {
    "convert": (["convert", "shapes", "my out.beton"], "Nothing was written. With --resume"),
    "eval": (["eval", "runs/a"], "features already extracted are kept"),
    "embed": (["embed", "runs/a", "my photos"], "Nothing was written"),
    "export": (["export", "runs/a", "--to", "onnx", "--out", "a.onnx"], "Nothing was written"),
    "bench": (["bench", "step"], "No result was written"),
    "sweep": (["sweep", "quickstart", "--grid", "optim.lr=1,2"], "Finished cells remain"),
    "report": (["report", "runs/a"], "page"),
    "train": (["train", "quickstart"], "No step is saved"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_says_what_remains_and_the_command_again(verb: str, tmp_path: Path) -> None:
    words, remains = VERBS[verb]
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    first, second = done.stderr.strip().splitlines()[-2:]
    assert first.startswith("Stopped by SIGINT. ")
    assert remains in first
    assert second.startswith(f"Run it again: fastssl {verb} ")
    assert "'my out.beton'" in second or "'my photos'" in second or " my " not in second
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def interrupted(words: list[str], folder: Path, ready: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """A process that gets SIGINT once it is ready."""
    command = [sys.executable, "-m", "fastssl", *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_conversion_that_was_stopped_continues_with_the_line_that_it_printed(tmp_path: Path) -> None:
    out = tmp_path / "my out"
    words = ["convert", "shapes", "my out/a.beton", "--count", "20000", "--side-px", "64"]
    done = interrupted(words, tmp_path, lambda: out.exists() and any(out.iterdir()))
    assert (done.returncode, out.exists()) == (130, False), done.stderr

    journal = out / ".a.beton.resume"
    words = [*words, "--resume"]
    done = interrupted(words, tmp_path, lambda: journal.exists() and journal.stat().st_size > 1 << 20)
    assert done.returncode == 130, done.stderr
    assert os.listdir(out) == [journal.name]
    first, second = done.stderr.strip().splitlines()[-2:]
    assert "converted so far remain" in first
    assert second == "Run it again: fastssl convert shapes 'my out/a.beton' --count 20000 --side-px 64 --resume"


def test_printed_commands_hold_no_path_that_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("train", Path("-a.yaml"), "--dry-run") == "fastssl train ./-a.yaml --dry-run"
    monkeypatch.setattr(sys, "argv", ["fastssl", "train", "-s", "seed=1", "--", "-a.yaml"])
    assert same_command("--resume") == "fastssl train -s seed=1 --resume -- -a.yaml"


def test_an_evaluation_that_was_stopped_keeps_features_and_no_result(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("features", "evaluations.jsonl"))
    words = ["eval", "run", "--probe", "linear", "--linear-epochs", "10000000", "--device", "cpu"]
    features = tmp_path / "run" / "features"
    done = interrupted(words, tmp_path, lambda: len(list(features.glob("[!.]*.safetensors"))) == 2)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^Run it again: fastssl eval run --probe linear", done.stderr, re.MULTILINE)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert {path.suffix for path in features.iterdir()} == {".safetensors"}
