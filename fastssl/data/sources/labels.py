"""What counts as a label, and the classes that labels make.

A label is a class name, or a number whose digits are its class's name. Empty text, null, NaN and -1 mean that the image
has none. N images.
"""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1
_NO_LABEL = frozenset(("", "-1", "nan", "null"))
_MAX_DIGITS = 18


def read_label(value: Any) -> int | str:
    """A class name, a number, or -1 for no label.

    Args:
        value: text, a whole number (as a float, too), a bool, None, or a list of one of them.

    Raises:
        ValueError: one sentence, for anything else.
    """
    match value:
        case None:
            return UNLABELED
        case str():
            return _read_text(value)
        case bytes():
            return _read_text(value.decode("utf-8"))
        case bool() | np.bool_():
            return int(value)
        case int() | np.integer():
            number = int(value)
        case float() | np.floating() | Decimal():
            if math.isnan(value):
                return UNLABELED
            if not math.isfinite(value) or value != int(value):
                raise ValueError(f"label {value} is not a whole number")
            number = int(value)
        case list() | tuple() if len(value) == 1:
            return read_label(value[0])
        case _:
            raise ValueError(f"label {str(value)[:60]!r} is neither a name nor a whole number")
    if not UNLABELED <= number < 10**_MAX_DIGITS:
        raise ValueError(f"label {number} is out of range; labels are 0 or larger, and -1 means none")
    return number


def _read_text(text: str) -> int | str:
    name = normal_name(text)
    if re.fullmatch(r"[+-]?\d{1,18}\.0*", name, re.ASCII):  # a column of numbers with gaps, as pandas writes it
        name = str(int(name.partition(".")[0]))
    if name.casefold() in _NO_LABEL:
        return UNLABELED
    if re.fullmatch(r"-\d+", name, re.ASCII):
        raise ValueError(f"label {name} is out of range; labels are 0 or larger, and -1 means none")
    return name


def normal_name(name: str) -> str:
    """The one spelling of a class name: no blanks around it, composed characters (NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def sorted_names(names: Collection[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: by number where all are numbers, else by name."""
    if all(name.isdecimal() and len(name) <= _MAX_DIGITS for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def number_labels(
    labels: Sequence[int | str], others: Iterable[int | str] = ()
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and int64 labels_N of what `read_label` returned; memory grows with N, not with the numbers.

    Args:
        labels: of the images.
        others: of the other splits, so that a class missing from one does not renumber the others; they count where
            they share a class with these.
    """
    names, more = ({str(label) for label in part if label != UNLABELED} for part in (labels, others))
    classes = sorted_names(names | more if names & more else names)
    index = {name: i for i, name in enumerate(classes)} | {str(UNLABELED): UNLABELED}
    return classes, np.array([index[str(label)] for label in labels], np.int64)


def read_labels(values: Iterable[Any]) -> tuple[list[int | str], list[tuple[int, str]]]:
    """All labels, and (position, sentence) of the values that are none."""
    labels: list[int | str] = []
    bad: list[tuple[int, str]] = []
    for i, value in enumerate(values):
        try:
            labels.append(read_label(value))
        except ValueError as error:
            labels.append(UNLABELED)
            bad.append((i, str(error)))
    return labels, bad
