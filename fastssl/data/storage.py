"""What a file system refuses, as a sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

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
