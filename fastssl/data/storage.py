"""Writing files: names to write under until all is well, and what a file system refuses, as a sentence."""

import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastssl.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is being written into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "Free some space." if error.errno in _FULL else "Choose another target."
        raise UserError(f"{path} cannot be written: {reason}", fix) from error


def temporary_name(path: Path, suffix: str) -> Path:
    """A hidden name beside `path` that no other process or thread uses."""
    return path.with_name(f".{path.name}.{_here()}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}")


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that are no more left half-written of `path` and its manifest."""
    if os.name != "posix":  # elsewhere to ask for a process is to end it
        return
    name, unique = re.escape(path.name), rf"{_here()}\.(\d+)\.[0-9a-f]{{8}}"
    # the first dot and the last part are of a writer that was given a temporary name
    left = re.compile(rf"\.?\.{name}(?:\.json)?\.{unique}\.(?:part|tmp)(?:\.{unique}\.tmp)?")
    with suppress(OSError):  # what cannot be removed is in nobody's way
        for found in list(path.parent.iterdir()):
            match = left.fullmatch(found.name)
            if match and not _is_alive(int(match[1])):
                shutil.rmtree(found) if found.is_dir() else found.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@functools.cache
def _here() -> str:
    """Where a process number means something: this machine and, in a container, its own table of processes."""
    table = ""
    with suppress(OSError):
        table = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {table}".encode()).hexdigest()[:8]


@contextmanager
def parents(folder: Path) -> Iterator[None]:
    """Make the folder; if what follows fails, remove again what was made here."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}", "Choose another target.") from error
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
