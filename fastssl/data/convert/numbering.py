"""Numbers for the classes of a stream, which are names until its end, when their sorted order is known."""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fastssl.data.sources.base import Source, Stream, class_labels
from fastssl.errors import UserError


class Numbering:
    """Keeps the label of every stored sample, eight bytes each.

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
