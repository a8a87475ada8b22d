"""What Ctrl-C and SIGTERM leave of a verb's work, and the command that continues it.

A training run catches the first one itself, and saves; a second one ends it here.
"""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

EXIT_CODE = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
NOTHING = "Nothing was written."
# By verb; others write nothing before their end.
REMAINS = {
    "bench": "No result was written; runs that `bench tta` has finished or saved remain.",
    "eval": "No result was written; features already extracted are kept in the run's folder.",
    "report": "A page that was there before remains.",
    "sweep": "Finished cells remain, and data files that were converted.",
    "train": "No step is saved; data files that were converted remain.",
}
RESUMED = "The images converted so far remain, in a hidden file next to the output."
NOT_RESUMED = f"{NOTHING} With --resume a conversion keeps what it has done."


def command(*words: object) -> str:
    """A line for a shell, its words quoted where they have to be, and no path like an option."""
    return shlex.join(["fastssl", *map(typed, words)])


def typed(word: object) -> str:
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def same_command(*more: str) -> str:
    """What was typed, with the options that it lacks."""
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    return command(*given[:at], *(word for word in more if word not in given), *given[at:])


def remains(verb: str | None) -> str:
    """One line on what is on disk."""
    if verb == "convert":
        return RESUMED if "--resume" in sys.argv else NOT_RESUMED
    return REMAINS.get(verb or "", NOTHING)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Two lines when a signal ends the block, and the exit code that shells give such an end."""
    try:
        yield
    except KeyboardInterrupt as stop:
        say("SIGINT", stop)
        sys.exit(EXIT_CODE)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            say("SIGTERM", stop)
        raise


def say(name: str, stop: BaseException) -> None:
    """The two lines; what a verb knows better than `remains`, it added to the exception as a note."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    kept = " ".join(getattr(stop, "__notes__", [])) or remains(verb)
    again = same_command("--resume") if verb == "train" else same_command()
    print(f"Stopped by {name}. {kept}\nRun it again: {again}", file=sys.stderr)
