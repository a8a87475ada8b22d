"""What an earlier record holds, so that a grid goes on where the folders of its runs are gone: --resume."""

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs.environment import hardware


def record_at(path: Path, bench: str) -> dict[str, Any] | None:
    """The record at that path; None where there is none yet.

    Raises:
        UserError: when the file is not a record of that benchmark.
    """
    if not path.exists():
        return None
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_one = before["bench"] == bench
    except (ValueError, KeyError, TypeError):
        is_one = False
    if not is_one:
        raise UserError(f"{path} is not a record of bench/{bench}.py.", "Choose another file for the record.")
    return before


def earlier(path: Path, bench: str, recipe: Recipe) -> dict[str, Any] | None:
    """The record at that path, as of `record_at`.

    Raises:
        UserError: when it is of another recipe.
    """
    before = record_at(path, bench)
    if before and not is_of(before["recipe"], recipe):
        raise another(path, "recipe")
    return before


def is_of(recorded: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a record's recipe is this one; a setting that came since has its default there."""
    try:
        return load(recorded) == recipe
    except UserError:
        return False


def refuse_another_grid(
    path: Path,
    before: dict[str, Any],
    asked: Namespace,
    parse: Callable[[Sequence[str]], Namespace],
    grid: Callable[[Namespace], Any],
    *,
    what: str = "grid",
) -> None:
    """
    Args:
        path: of the record, for the message.
        before: the record, which holds its command.
        asked: this command's arguments.
        parse: of a command's words, without the program.
        grid: what of the arguments decides which runs there are.
        what: a word for it.

    Raises:
        UserError: when the record's command asked for other runs.
    """
    try:
        with redirect_stderr(StringIO()):
            theirs = grid(parse(shlex.split(before["command"])[1:]))
    except SystemExit:  # an option that is no more
        theirs = None
    if theirs != grid(asked):
        raise another(path, what)


def another(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is of another {what} than this command's.", "Choose another file for the record, or omit --resume."
    )


def say_kept(path: Path, kept: int, held: int) -> None:
    """One line on how many of a record's runs go on, and that the others will not be in it any more."""
    left = (
        f" {held - kept} others there are of seeds, cells or levers not asked for and are left out."
        if kept < held
        else ""
    )
    print(f"{kept} runs are those of {path}.{left}", file=sys.stderr)


def here(before: dict[str, Any]) -> bool:
    """Whether the record's seconds are of a machine like this one."""
    now = hardware()
    return all(before["hardware"][key] == now[key] for key in ("cpu", "cores", "gpus"))
