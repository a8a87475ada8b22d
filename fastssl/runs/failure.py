"""What ended a run that failed: failure.json in its folder, read by `fastssl runs`; a new start takes it away."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from fastssl.errors import Interrupted, UserError

FAILURE = "failure.json"


@contextlib.contextmanager
def noted(folder: Path | None) -> Iterator[None]:
    """Leaves failure.json in a run's folder when an error ends the block; the block begins where the run does.

    A signal (`Interrupted`, `KeyboardInterrupt`) is no failure: such a run is whole and can go on.

    Args:
        folder: the run's; None on ranks that do not write.
    """
    if folder is None:
        yield
        return
    path = folder / FAILURE
    path.unlink(missing_ok=True)
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            path.write_text(json.dumps(note_of(error), indent=1), encoding="utf-8")
        raise


def note_of(error: Exception) -> dict[str, str]:
    if isinstance(error, UserError):
        return {"what": error.what, "fix": error.fix}
    return {"what": f"{type(error).__name__}: {error}", "fix": ""}
