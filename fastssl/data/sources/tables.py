"""Sources that hold their samples by position already: the embedded shapes and an existing .beton."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.beton.reader import Beton
from fastssl.data.sources import shapes
from fastssl.data.sources.base import Indexed, Item, names_next_to, no_labels
from fastssl.data.sources.choices import Choices, choice
from fastssl.data.sources.labels import number_labels
from fastssl.errors import UserError, option


def shapes_source(split: str, *, seed: int, count: int, side_px: int) -> Indexed:
    """`count` embedded shapes; every split is a set of its own, whatever the seed."""
    name = f"shapes/{split}/{seed}".encode()
    set_seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
    labeled = split != "unlabeled"
    labels_N = np.arange(count, dtype=np.int64) % len(shapes.CLASSES) if labeled else no_labels(count)

    def read(index: int) -> Item:
        images_1HWC, _ = shapes.images(1, side_px, seed=set_seed, start=index)
        return Item(f"shapes[{index}]", images_1HWC[0], int(labels_N[index]))

    return Indexed("shapes", shapes.CLASSES if labeled else (), labels_N, read)


def beton_source(path: Path, split: str, choices: Choices) -> Indexed:
    """The samples of an existing .beton, as they are stored; one split already.

    Labels are those of the field that `choices.label_column` names, else of `label`.
    """
    beton = Beton(path)
    labels_N = no_labels(len(beton)) if split == "unlabeled" else _labels(path, beton, choices.label_column)
    names = names_next_to(path)
    if names is None:
        names, labels_N = number_labels(labels_N.tolist())

    def read(index: int) -> Item:
        mode, data = beton.encoded(index)
        return Item(
            f"{path.name}[{index}]",
            bytes(data) if mode == "jpg" else beton.image(index),
            int(labels_N[index]),
        )

    return Indexed(str(path), names if split != "unlabeled" else (), labels_N, read)


def _labels(path: Path, beton: Beton, field: str | None) -> NDArray[np.int64]:
    """The integer field that was named, else `label`; an error where other integers may be labels or positions."""
    names = ", ".join(beton.integers)
    if field is None and "label" not in beton.integers and names:
        raise UserError(
            f"{path} has no field 'label', but integers in: {names}.",
            f"Name the labels with {choice('label_column')}, or take {option('split', 'unlabeled')}.",
        )
    if field is not None and field not in beton.integers:
        raise UserError(f"{path} has no integer field {field!r}.", f"Name one of: {names or 'none'}.")
    return beton.labels if field is None else beton.integers[field]
