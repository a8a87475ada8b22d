"""The command `fastssl`: one module per verb, which parses, calls and prints. Heavy imports happen inside a verb, so
--help is instant.

Standard output carries results (with --json exactly one record, on the last line); progress and messages go to
standard error. Exit codes: 0 done, 2 an error that the user can fix, 75 stopped by a signal after saving,
130 and 143 stopped by Ctrl-C and SIGTERM with nothing to save; two lines say what remains.
"""

import codecs
import contextlib
import io
import os
import signal
import sys
import warnings
from typing import Any

from fastssl.cli import (
    bench,
    convert,
    doctor,
    duplicates,
    embed,
    eval,
    export,
    preview,
    recipe,
    recipes,
    report,
    runs,
    sweep,
    train,
)
from fastssl.cli.app import app
from fastssl.errors import OwnWarning, UserError, at_command_line

# Importing a verb's module adds the verb.
__all__ = [
    "bench",
    "convert",
    "doctor",
    "duplicates",
    "embed",
    "eval",
    "export",
    "main",
    "preview",
    "recipe",
    "recipes",
    "report",
    "runs",
    "sweep",
    "train",
]


def show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Our own warnings as one line, others as Python shows them."""
    if issubclass(category, OwnWarning):
        print(f"Warning: {message}", file=sys.stderr)
    else:
        python_show(message, category, *place, **more)


python_show = warnings.showwarning


def written(error: UnicodeError) -> tuple[bytes | str, int]:
    """What stdout gets for characters that its encoding lacks: the bytes of a file's name as they are, else "?"."""
    assert isinstance(error, UnicodeEncodeError)
    with contextlib.suppress(UnicodeEncodeError):
        return codecs.lookup_error("surrogateescape")(error)
    return "?" * (error.end - error.start), error.end


def main() -> None:
    """Runs a verb; turns a UserError into two lines and exit code 2."""
    # as Ctrl-C, so that half-written files are removed; a training run saves instead while it lasts
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("written", written)
        sys.stdout.reconfigure(errors="written")
    at_command_line()
    try:
        app(standalone_mode=True)  # and a signal into what remains, see `stopped`
    except UserError as error:
        if os.environ.get("FASTSSL_TRACEBACK") == "1":
            raise
        print(f"Error: {error.what}\n{error.fix}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if os.environ.get("FASTSSL_TRACEBACK") == "1":
            raise
        print(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        print("Check the path, its permissions and the space left; FASTSSL_TRACEBACK=1 shows where.", file=sys.stderr)
        sys.exit(2)
