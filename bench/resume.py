"""What an earlier record holds, so that a grid goes on where the folders of its runs are gone: --resume."""

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastssl.errors import UserError
from fastssl.recipe.schema import Recipe
from fastssl.runs.environment import hardware


def earlier(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The record at that path; None where there is none yet.

    Raises:
        UserError: when it is of another recipe.
    """
    if not path.exists():
        return None
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if before["recipe"] != recipe.model_dump(mode="json"):
        raise another(path, "recipe")
    return before


def refuse_another_grid(
    path: Path,
    before: dict[str, Any],
    asked: Namespace,
    parse: Callable[[Sequence[str]], Namespace],
    grid: Callable[[Namespace], Any],
) -> None:
    """
    Args:
        path: of the record, for the message.
        before: the record, which holds its command.
        asked: this command's arguments.
        parse: of a command's words, without the program.
        grid: what of the arguments decides which runs there are.

    Raises:
        UserError: when the record's command asked for other runs.
    """
    if grid(parse(shlex.split(before["command"])[1:])) != grid(asked):
        raise another(path, "grid")


def another(path: Path, what: str) -> UserError:
    return UserError(f"{path} is of another {what} than this command's.", "Choose another --json, or omit --resume.")


def here(before: dict[str, Any]) -> bool:
    """Whether the record's seconds are of a machine like this one."""
    now = hardware()
    return all(before["hardware"][key] == now[key] for key in ("cpu", "cores", "gpus"))
