"""What a person sees when work ends early: a mistake with its fix, or a run that a signal stopped."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_python = True


def at_command_line() -> None:
    """From now on, messages name options as one types them in a shell."""
    global _python
    _python = False


def option(name: str, value: object = None, *, flag: str | None = None) -> str:
    """An argument in the words of whoever called: `resume=True` in Python, `--resume` at the command line.

    Args:
        name: of the Python argument, such as "run_dir".
        value: to set, where True is a switch; None names the argument alone.
        flag: name at the command line, where that is another.
    """
    if _python:
        shown = str(value) if isinstance(value, Path) else value
        return name if value is None else f"{name}={shown!r}"
    flag = f"--{(flag or name).replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {shlex.quote(str(value))}"


class UserError(Exception):
    """A mistake a person can fix. The command line prints it as two lines and exits with code 2.

    Args:
        what: one sentence naming the field, file or value and what is wrong with it.
        fix: one sentence saying what to set, install or run.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\n{fix}")
        self.what = what
        self.fix = fix


def raise_all(errors: Iterable[UserError]) -> None:
    """Raises one UserError that names every mistake and every fix; nothing where there are none."""
    found = list(errors)
    whats, fixes = (list(dict.fromkeys(texts)) for texts in ([e.what for e in found], [e.fix for e in found]))
    if len(whats) == 1:
        raise found[0]
    if whats:
        listed = "; ".join(what.rstrip(".") for what in whats)
        raise UserError(f"{len(whats)} problems: {listed}.", " ".join(fixes))


def errors_of(*checks: Callable[[], object]) -> Iterator[UserError]:
    """The mistakes that checks raise, each of which would hide the next."""
    for check in checks:
        try:
            check()
        except UserError as error:
            yield error


class OwnWarning(UserWarning):
    """This package's own; the command line prints it as one line."""


class DamagedWarning(OwnWarning):
    """A file is damaged and an earlier one is used."""


class PlaceWarning(OwnWarning):
    """A run's data are not where its recipe says from here, and are taken from where they were when it trained."""


class SlowWarning(OwnWarning):
    """Something is done in a slower way, with the same result."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised by the loop after a signal, when the checkpoint is written."""

    def __init__(self, name: str, run_dir: Path) -> None:
        joint = ", " if _python else " "
        resume = joint.join((option("resume", True), option("run_dir", run_dir)))
        super().__init__(f"Stopped by {name} after saving. Continue with {resume}.")
        self.name = name
