"""Labels of a conversion: class names that a person gives, numbers for names as they come, and the final numbers."""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.beton.format import FIELD, HEADER, INT, record_type
from fastssl.data.sources.base import Source, Stream
from fastssl.data.sources.labels import UNLABELED, normal_name, sorted_names
from fastssl.data.sources.places import class_labels
from fastssl.errors import UserError


def read_classes(given: str) -> tuple[str, ...]:
    """Names from a manifest (`train.beton.json`), a text file with one name a line, or a list with commas.

    Raises:
        UserError: when there is none, one is given twice, or the file cannot be read.
    """
    path, fix = Path(given), "Give a manifest such as train.beton.json, a file with one name per line, or a,b,c."
    try:
        if given.endswith(".json"):
            names = [str(name) for name in json.loads(path.read_text(encoding="utf-8-sig"))["classes"]]
        elif "," not in given and path.is_file():
            names = path.read_text(encoding="utf-8-sig").splitlines()
        elif "," not in given and ("/" in given or path.suffix):
            raise UserError(f"There is no file {given} of class names.", fix)
        else:
            names = given.split(",")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The classes cannot be read from {given}: {type(error).__name__}.", fix) from error
    names = [normal_name(name) for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{given!r} names " + (f"{twice[0]!r} twice." if twice else "no class."), fix)
    return tuple(names)


class Numbering:
    """Numbers for the classes of a source; a stream's are names until its end, when their sorted order is known.

    Keeps the label of every stored sample, eight bytes each.

    Attributes:
        changed: after `finish`: some labels differ from the numbers that were given out on the way.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._labels = array("q")
        self._given = source.classes is not None
        self._numbers: dict[str, int] = {}  # by name, in order of appearance where no classes are given
        if source.classes is not None:
            self._numbers = {name: i for i, name in enumerate(source.classes)}
        self.changed = False

    def number(self, labels: Iterable[int | str]) -> list[int]:
        """The final numbers where the classes are given, else numbers for the time being; -1 stays."""
        numbers = [self._known(label) if self._given else self._new(label) for label in labels]
        self._labels.extend(numbers)
        return numbers

    def _new(self, label: int | str) -> int:
        return UNLABELED if label == UNLABELED else self._numbers.setdefault(str(label), len(self._numbers))

    def _known(self, label: int | str) -> int:
        count = len(self._numbers)
        if isinstance(label, int):
            number = label
        else:
            number = int(label) if label.isdecimal() and len(label) < 10 else self._numbers.get(label, count)
        if number >= count:
            raise UserError(
                f"{self._source.name} has an image of class {label!r}, and names {count} classes: "
                f"{', '.join(itertools.islice(self._numbers, 5))}{', and more' if count > 5 else ''}.",
                "Fix the label, or the list of class names next to the data.",
            )
        return number

    def finish(self) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Class names and final labels, int64 (N,)."""
        source, labels_N = self._source, np.frombuffer(self._labels, np.int64)
        if source.classes is not None:
            return source.classes, labels_N
        assert isinstance(source, Stream)
        if source.directories is None:
            classes = sorted_names(self._numbers)
            label_of = {name: i for i, name in enumerate(classes)}
        else:
            classes, label_of_rest = class_labels(source.directories.values(), known=source.known)
            label_of = {directory: label_of_rest[rest] for directory, rest in source.directories.items()}
        table = np.array([*(label_of[name] for name in self._numbers), UNLABELED], np.int64)
        renumbered_N = table[labels_N]  # -1 picks the last entry, -1
        self.changed = not np.array_equal(renumbered_N, labels_N)
        return classes, renumbered_N


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
