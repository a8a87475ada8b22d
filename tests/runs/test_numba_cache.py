"""numba's cache: two processes that compile for different types at once keep their own kernels."""

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
    file = cache_of_a_process(tmp_path, is_locked=True)
    file.save("uint8", "kernel")
    assert file.load("uint8") == "kernel"


def cache_of_a_process(folder: Path, *, is_locked: bool) -> Any:
    file = IndexDataCacheFile(str(folder), "kernel", "stamp")
    if is_locked:
        locked(types.SimpleNamespace(_cache=types.SimpleNamespace(_cache_file=file)))
    return file


@pytest.mark.parametrize("is_locked", [True, False])
def test_kernels_compiled_at_once_keep_their_names(tmp_path: Path, is_locked: bool) -> None:
    one, other = (cache_of_a_process(tmp_path, is_locked=is_locked) for _ in range(2))
    second = threading.Thread(target=other.save, args=("float32", "kernel of float32"))
    save_index = one._save_index

    def overtaken(overloads: dict[str, str]) -> None:
        """The other process comes between the choice of a name and its writing."""
        second.start()
        second.join(timeout=0.5)
        save_index(overloads)

    one._save_index = overtaken
    one.save("uint16", "kernel of uint16")
    second.join()
    kernels = [other.load(key) for key in ("float32", "uint16")]
    assert (kernels == ["kernel of float32", "kernel of uint16"]) is is_locked
