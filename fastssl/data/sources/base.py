"""What every source of images is: items by position, or items in a stream; each names itself and its class.

Two shapes and no third: `Indexed` knows all its labels and reads any item from any thread; `Stream` can only be
read from its beginning. Whoever needs order or a choice out of a stream spools it first (`data/spool`).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpf",
        ".jpx",
    )
)
MAX_ITEM_BYTES = 1 << 28  # 256 MiB encoded: larger is no picture that training can use
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
    "unlabeled": ("unlabeled", "unlabelled"),
}


class Item(NamedTuple):
    """One image as the source holds it.

    Attributes:
        key: its name there, unique or nearly so, for messages and the list of skipped items.
        data: encoded file, or uint8 / uint16 pixels (H, W, C), or the reason why there is neither.
        label: class index, -1 for none; in a stream that has yet to meet its classes, its directory.
    """

    key: str
    data: bytes | np.ndarray | Exception
    label: int | str = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Indexed:
    """Items by position 0 .. N-1.

    Attributes:
        name: what a person calls it, for messages.
        classes: class names by label, () when nothing is labeled.
        labels_N: int64, -1 where there is no label.
        read: item at a position; safe to call from several threads at once.
    """

    name: str
    classes: tuple[str, ...]
    labels_N: NDArray[np.int64]
    read: Callable[[int], Item]

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Items one after the other; `items` starts again from the first at each call.

    Attributes:
        name: what a person calls it, for messages.
        classes: class names by label; None when labels arrive as directories (`Item.label` is a str).
        count: number of items, None when only the end tells.
        items: makes the iterator.
        directories: with classes None, every directory of every split met so far, whichever split is yielded.
    """

    name: str
    classes: tuple[str, ...] | None
    count: int | None
    items: Callable[[], Iterator[Item]]
    directories: set[str] = dataclasses.field(default_factory=set)


Source = Indexed | Stream


def is_image_name(name: str) -> bool:
    """True for a picture's suffix, unless a component is hidden or one of macOS's shadows."""
    _, dot, suffix = name.rpartition(".")
    if "." + suffix.lower() not in IMAGE_SUFFIXES or not dot:
        return False
    if "/." not in "/" + name and "__MACOSX" not in name:  # nearly all names, and they are many
        return True
    return not any((p.startswith(".") and p not in (".", "..")) or p == "__MACOSX" for p in name.split("/"))


class Place(NamedTuple):
    """Where a directory stands: the split it belongs to, what lies above that, and the rest of its path."""

    split: str | None
    parent: str
    rest: str


def place_of(directory: str) -> Place:
    """A split is told by the first or second component of the path."""
    parts = PurePosixPath(directory).parts
    for depth, part in enumerate(parts[:2]):
        for split, names in SPLITS.items():
            if part.lower() in names:
                return Place(split, "/".join(parts[:depth]), "/".join(parts[depth + 1 :]))
    return Place(None, "/".join(parts), "/".join(parts))


def check_places(source: str, places: Collection[Place]) -> None:
    """UserError when class folders stand beside train/ or test/: is `train` a split there, or a class?"""
    parents = {place.parent for place in places if place.split is not None}
    above = {"", *parents}
    outside = sorted(place.rest for place in places if place.split is None and place.rest not in above)
    if parents and outside:
        raise UserError(
            f"{source} has images in split folders and in others beside them, such as {outside[0]!r}",
            "Give one with train/ and test/ alone, or rename a class that is called like a split.",
        )


def class_labels(directories: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, sorted, and the label of each directory.

    What all directories have in common is a wrapper; the component after it is the class, and deeper ones are
    the class's own affair. Images right in the wrapper have no class: -1.
    """
    parts = {directory: PurePosixPath(directory).parts for directory in directories}
    common = 0
    while parts and all(len(p) > common for p in parts.values()):
        if len({p[common] for p in parts.values()}) > 1:
            break
        common += 1
    class_of = {directory: p[common] if len(p) > common else None for directory, p in parts.items()}
    classes = tuple(sorted({name for name in class_of.values() if name is not None}))
    index = {name: i for i, name in enumerate(classes)}
    return classes, {directory: -1 if name is None else index[name] for directory, name in class_of.items()}


def choose_split(source: str, names: Sequence[str], split: str) -> tuple[list[int], tuple[str, ...], NDArray[np.int64]]:
    """Positions in `names` (sorted by name) of one split's images, the class names, and the chosen labels_N.

    Where train/, test/ and so on exist, images right beside those folders belong to none; where they do not, all
    images are the train split. The classes are those of all labeled splits together, so that a class missing from
    one does not renumber the others.
    """
    if not names:
        raise UserError(f"{source} holds no image files", "Give one with .jpg, .png, .webp, .bmp, .tif or .gif.")
    places = {directory: place_of(directory) for directory in {name.rpartition("/")[0] for name in names}}
    check_places(source, places.values())
    found = {place.split for place in places.values()}
    key = split if found != {None} else None
    if key is None and split not in ("train", "unlabeled"):
        raise missing_split(source, split, ())
    chosen = [i for i, name in enumerate(names) if places[name.rpartition("/")[0]].split == key]
    if not chosen:
        raise missing_split(source, split, (s for s in found if s is not None))
    chosen.sort(key=names.__getitem__)
    if split == "unlabeled":
        return chosen, (), np.full(len(chosen), -1, np.int64)
    labeled = [p for p in places.values() if p.split == key or (key and p.split not in (None, "unlabeled"))]
    classes, label_of = class_labels(place.rest for place in labeled)
    labels = [label_of[places[names[i].rpartition("/")[0]].rest] for i in chosen]
    return chosen, classes, np.array(labels, np.int64)


def missing_split(name: str, split: str, found: Iterable[str]) -> UserError:
    """The error for a split that a source does not have."""
    others = ", ".join(sorted(found))
    return UserError(f"{name} has no images for split {split!r}", f"Set split to one of: {others or 'train'}.")


def files_of_split(paths: Sequence[Path], split: str, folder: Path) -> list[Path]:
    """Of a folder's files those of one split, sorted; told by a word in their path below the folder.

    Where none holds such a word, all are the train split.
    """
    words: dict[Path, str | None] = {}
    for path in paths:
        parts = set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()))
        words[path] = next((s for s, names in SPLITS.items() if parts & set(names)), None)
    if set(words.values()) <= {None} and split in ("train", "unlabeled"):
        return sorted(paths)
    chosen = sorted(path for path in paths if words[path] == split)
    if not chosen:
        raise missing_split(str(folder), split, {word for word in words.values() if word})
    return chosen


def names_beside(path: Path) -> tuple[str, ...] | None:
    """Class names in the manifest of a converted file or folder, None when there is no such manifest."""
    try:
        names = json.loads(path.with_name(path.name + ".json").read_text())["classes"]
        return tuple(str(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def no_labels(count: int) -> NDArray[np.int64]:
    """int64 (count,) of -1."""
    return np.full(count, -1, np.int64)


def numbered(labels_N: NDArray[np.int64]) -> tuple[str, ...]:
    """Classes that have no names but their numbers."""
    return tuple(str(i) for i in range(int(labels_N.max(initial=-1)) + 1))


def renumber(source: Indexed, classes: tuple[str, ...]) -> Indexed:
    """The same items with labels that index `classes`."""
    unknown = set(source.classes) - set(classes)
    if unknown:
        raise UserError(
            f"{source.name} has classes that are not in the given list: {', '.join(sorted(unknown))}",
            "Give a list of classes that names them all.",
        )
    table = np.array([classes.index(name) for name in source.classes] + [-1], np.int64)
    labels_N = table[source.labels_N]  # -1 picks the last entry, -1

    def read(index: int) -> Item:
        return source.read(index)._replace(label=int(labels_N[index]))

    return Indexed(source.name, classes, labels_N, read)
