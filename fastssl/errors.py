"""What a person sees when work ends early: a mistake with its fix, or a run that a signal stopped."""

from pathlib import Path


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


class DamagedWarning(UserWarning):
    """A file is damaged and an earlier one is used; the command line prints it as one line."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised by the loop after a signal, when the checkpoint is written."""

    def __init__(self, name: str, run_dir: Path) -> None:
        super().__init__(f"Stopped by {name} after saving. Continue with --resume --run-dir {run_dir}.")
        self.name = name
