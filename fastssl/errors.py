"""The one exception meant for people: what is wrong, and what to set."""


class UserError(Exception):
    """A mistake a person can mend. The command line prints it as two lines and exits with code 2.

    Args:
        what: one sentence naming the field, file or value and what is wrong with it.
        fix: one sentence saying what to set, install or run.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\n{fix}")
        self.what = what
        self.fix = fix
