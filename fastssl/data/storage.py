"""What a file system refuses while something is written, as a sentence."""

import errno
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
        raise UserError(f"{path} cannot be written: {reason}.", fix) from error


@contextmanager
def parents(folder: Path) -> Iterator[None]:
    """Make the folder; if what follows fails, remove again what was made here."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}.", "Choose another target.") from error
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
