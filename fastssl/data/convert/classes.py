"""Class names in the order of their labels, given by a person so that two sets agree."""

import json
from pathlib import Path

from fastssl.errors import UserError


def read_classes(given: str) -> tuple[str, ...]:
    """Names from a manifest (`train.beton.json`), a text file with one name a line, or a list with commas.

    Raises:
        UserError: when there is none, one is given twice, or the file cannot be read.
    """
    path, fix = Path(given), "Give a manifest such as train.beton.json, a file with one name a line, or a,b,c."
    try:
        if given.endswith(".json"):
            names = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["classes"]]
        elif "," not in given and path.is_file():
            names = path.read_text(encoding="utf-8").splitlines()
        else:
            names = given.split(",")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the classes cannot be read from {given}: {type(error).__name__}", fix) from error
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{given!r} names " + (f"{twice[0]!r} twice." if twice else "no class."), fix)
    return tuple(names)
