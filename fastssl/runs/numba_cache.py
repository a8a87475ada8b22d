"""A cache for numba's compiled kernels where neither the installation nor the home folder can be written to.

numba refuses to import such a function at all ("no locator available"), so its cache is chosen before that.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path


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


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the nearest one above it that exists."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
