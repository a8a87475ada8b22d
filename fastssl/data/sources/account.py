"""What a source holds and what was passed over: printed when a conversion ends, and kept in the manifest."""

import dataclasses
from collections import Counter
from typing import Any


@dataclasses.dataclass(slots=True)
class Account:
    """Filled in while a source is read.

    Attributes:
        passed_over: number of files, members or rows by the reason why they are not images here.
        outside: the same of files next to those that are read, known before any is.
        columns: columns or keys of a table, in their order.
        image_from, label_from: where images and labels were taken from, None where that is not a choice.
        splits: number of images of each split that was seen.
        notes: sentences on what else happened.
    """

    passed_over: Counter[str] = dataclasses.field(default_factory=Counter)
    outside: Counter[str] = dataclasses.field(default_factory=Counter)
    columns: tuple[str, ...] = ()
    image_from: str | None = None
    label_from: str | None = None
    splits: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)

    def clear(self) -> None:
        """Forget the counts: the source is read anew."""
        self.passed_over.clear()
        self.splits.clear()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed_over": dict(sorted((self.passed_over + self.outside).items())),
            "columns": list(self.columns),
            "image_from": self.image_from,
            "label_from": self.label_from,
            "splits": dict(sorted(self.splits.items())),
            "notes": list(self.notes),
        }


def suffix_of(name: str) -> str:
    """How a file that is no image is counted: by its suffix."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    if base.startswith(".") or any(part.startswith(".") for part in name.split("/")[:-1]):
        return "hidden file"
    return f".{suffix.lower()[:12]} file" if dot and stem else "file without a suffix"
