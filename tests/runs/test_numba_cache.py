"""numba's cache: processes that compile at once compile each kernel once, and keep their own of different types."""

import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import IndexDataCacheFile

from fastssl.runs.numba_cache import locked


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_stops_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    kernel, file = kernel_of_a_process(tmp_path, is_locked=True)
    kernel.compile("uint8")
    assert file.load("uint8") == "kernel of uint8"


def kernel_of_a_process(folder: Path, *, is_locked: bool) -> tuple[Any, Any]:
    """A kernel whose compilation is its saving, and its cache file."""
    file = IndexDataCacheFile(str(folder), "kernel", "stamp")
    kernel = types.SimpleNamespace(
        compile=lambda key: file.save(key, f"kernel of {key}"), _cache=types.SimpleNamespace(_cache_file=file)
    )
    return locked(kernel) if is_locked else kernel, file


@pytest.mark.parametrize("is_locked", [True, False])
def test_kernels_compiled_at_once_keep_their_names(tmp_path: Path, is_locked: bool) -> None:
    (one, file), (other, _) = (kernel_of_a_process(tmp_path, is_locked=is_locked) for _ in range(2))
    second = threading.Thread(target=other.compile, args=("float32",))
    save_index = file._save_index

    def overtaken(overloads: dict[str, str]) -> None:
        """The other process comes between the choice of a name and its writing."""
        second.start()
        second.join(timeout=0.5 if is_locked else None)  # the lock makes it wait for this one
        save_index(overloads)

    file._save_index = overtaken
    one.compile("uint16")
    second.join()
    kernels = [file.load(key) for key in ("float32", "uint16")]
    assert (kernels == ["kernel of float32", "kernel of uint16"]) is is_locked


MODULE = """
import sys
from numba import njit
from fastssl.runs.numba_cache import locked

@locked
@njit(cache=True)
def kernel(x):
    return x + 1

print("ready", flush=True)
sys.stdin.readline()
kernel(1)
print(sum(kernel.stats.cache_misses.values()))
"""


def test_processes_that_begin_at_once_compile_once(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(MODULE)
    command = [sys.executable, "kernels.py"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(3)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:  # all three have found an empty cache
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.communicate(timeout=300)[0] for process in started) == ["0\n", "0\n", "1\n"]
