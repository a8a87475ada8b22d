"""Writing files that are whole whatever happens: under a hidden name, synced, then renamed.

A kill at any moment, a full disk or a loss of power leaves the old file or the new one. Everything a run, a
conversion, an export or a benchmark leaves behind goes through here.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and renameat2
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what file systems without fsync answer


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace a file by new content; text is written as UTF-8.

    Raises:
        OSError: for example when the disk is full; the file is then as it was.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def atomic_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Replace a file by `json_text` of a value."""
    atomic_write(path, json_text(value, indent=1, default=default) + "\n")


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: they become null.

    Args:
        value: of mappings, sequences, texts, numbers, None and what `default` takes.
        indent: as for `json.dumps`.
        default: turns what JSON does not know into what it does.
    """
    return json.dumps(finite(value), indent=indent, default=default, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
        case _:
            return value


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden name in the same folder, to write a file or a folder under; it takes its own name after the block.

    After an error nothing has changed. What killed processes left of earlier attempts is removed.
    """
    remove_abandoned(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        remove(temporary)


def put_in_place(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder and give it its name, replacing what has it."""
    mode = mode_of_new_files(path)
    for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
        if file.is_file():
            file.chmod(mode)  # libraries that write through mkstemp leave 0600, whatever the umask
            sync(file)
    if temporary.is_dir():
        sync(temporary)
    if not path.is_dir():
        os.replace(temporary, path)
    elif not exchange(temporary, path):
        old = temporary_name(path, "old")
        os.replace(path, old)
        os.replace(temporary, path)
        remove(old)
    sync(path.parent)
    remove(temporary)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, which `os.replace` cannot do for folders; False where the system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return swap is not None and swap(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's names are on the disk.

    Raises:
        OSError: when a file cannot be stored; file systems that cannot sync are taken as they are.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def mode_of_new_files(path: Path) -> int:
    """The permissions that the umask, or the folder's access list, gives a new file of that name."""
    probe = temporary_name(path, "mode")
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def temporary_name(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name in the folder of `path` that no other process or thread uses."""
    return path.with_name(f".{path.name}.{process_table()}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}")


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that are no more left half-written of `path` and its manifest."""
    if os.name != "posix":  # elsewhere to ask for a process is to end it
        return
    name, unique = re.escape(path.name), rf"{process_table()}\.(\d+)\.[0-9a-f]{{8}}"
    # the first dot and the last part are of a writer that was given a temporary name
    pattern = re.compile(rf"\.?\.{name}(?:\.json)?\.{unique}\.(?!old)[a-z]+(?:\.{unique}\.(?!old)[a-z]+)?")
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        for left in [name for name in os.listdir(path.parent) if name.startswith(".")]:
            match = pattern.fullmatch(left)
            if match and not is_alive(int(match[1])):
                remove(path.with_name(left))


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@functools.cache
def process_table() -> str:
    """Where a process number means something: this machine and, in a container, its own table of processes."""
    table = ""
    with contextlib.suppress(OSError):
        table = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {table}".encode()).hexdigest()[:8]
