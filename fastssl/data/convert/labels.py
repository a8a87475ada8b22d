"""Labels of a conversion: class names that a person gives, numbers for names as they come, and the final numbers."""

import json
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.beton.format import FIELD, HEADER, INT, record_type
from fastssl.data.sources.base import Source, Stream, class_labels
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


class Numbering:
    """Numbers for the classes of a stream, which are names until its end, when their sorted order is known.

    Keeps the label of every stored sample, eight bytes each.

    Attributes:
        changed: after `finish`: some labels differ from the numbers that were given out on the way.
    """

    def __init__(self) -> None:
        self._labels = array("q")
        self._numbers: dict[str, int] = {}  # names in order of appearance
        self.changed = False

    def number(self, labels: Iterable[int | str]) -> list[int]:
        """The labels themselves where they are numbers, else numbers for the time being."""
        known = self._numbers
        numbers = [label if isinstance(label, int) else known.setdefault(label, len(known)) for label in labels]
        self._labels.extend(numbers)
        return numbers

    def finish(self, source: Source) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Class names and final labels, int64 (N,)."""
        labels_N = np.frombuffer(self._labels, np.int64)
        if self._numbers:
            assert isinstance(source, Stream)
            if labels_N.max() >= len(self._numbers):
                raise UserError(f"{source.name} labels some images by number and some by name", "Use one way for all.")
            classes, label_of = class_labels(source.directories)
            table = np.array([*(label_of[name] for name in self._numbers), -1], np.int64)
            renumbered_N = table[labels_N]  # -1 picks the last entry, -1
            self.changed = not np.array_equal(renumbered_N, labels_N)
            return classes, renumbered_N
        names = tuple(source.classes or ())
        more = range(len(names), int(labels_N.max(initial=-1)) + 1)  # numbers that no name was given for
        return (*names, *(str(i) for i in more)), labels_N


def relabel(path: Path, labels_N: NDArray[np.int64]) -> None:
    """Overwrite the first integer field of every sample of the file at `path`, which we wrote.

    An archive names its last class only at its end.
    """
    header = np.fromfile(path, HEADER, 1)[0]
    fields = np.fromfile(path, FIELD, int(header["fields"]), offset=HEADER.itemsize)
    kinds = [int(kind) for kind in fields["type"]]
    assert int(header["samples"]) == len(labels_N)
    at = HEADER.itemsize + fields.nbytes
    records = np.memmap(path, record_type(kinds), "r+", offset=at, shape=(len(labels_N),))
    records[f"f{kinds.index(INT)}"] = labels_N
    records.flush()
