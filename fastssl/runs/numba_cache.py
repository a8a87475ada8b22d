"""numba's cache of compiled kernels: one for machines where nothing can be written, and one process at a time in it.

Where neither the installation nor the home folder can be written to, numba refuses to import such a function at all
("no locator available"), so its cache is chosen before that.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Kernel = TypeVar("Kernel")


def provide(package: Path) -> Path | None:
    """Set NUMBA_CACHE_DIR to a folder that lasts as long as this process, where numba would find none of its own.

    Args:
        package: whose functions are compiled.

    Returns:
        The folder, or None where it is not needed.
    """
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if os.environ.get("NUMBA_CACHE_DIR") or is_writable(package / "__pycache__") or is_writable(home_cache / "numba"):
        return None
    folder = tempfile.mkdtemp(prefix="fastssl-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = folder  # child processes use it too
    if "numba" in sys.modules:  # it has read the environment already
        sys.modules["numba"].config.CACHE_DIR = folder
    return Path(folder)


def locked(kernel: Kernel) -> Kernel:
    """A function of `numba.njit(cache=True)` that one process at a time compiles, or reads from its cache.

    Those that come later wait and read what the first has compiled. And numba gives a new kernel the first free file
    name and writes the index before the kernel: without a lock two processes that compile for different types take the
    same name, and one then runs the other's kernel.
    """
    index = kernel._cache._cache_file._index_path  # type: ignore[attr-defined]
    kernel.compile = alone(f"{index}.lock", kernel.compile)  # type: ignore[attr-defined]
    return kernel


def alone(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call under a lock on that file."""
    from filelock import FileLock  # here, because every command imports this module

    def locked_call(*arguments: Any) -> Any:
        lock = FileLock(path)
        try:
            lock.acquire()
        except (OSError, NotImplementedError):  # a cache that nobody can write, or a file system without locks
            return call(*arguments)
        try:
            return call(*arguments)
        finally:
            lock.release()

    return locked_call


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the nearest one above it that exists."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
