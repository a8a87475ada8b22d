"""What every source of images is: items by position, or items in a stream; each names itself and its class.

Two shapes and no third: `Indexed` knows all its labels and reads any item from any thread; `Stream` can only be
read from its beginning. Whoever needs order or a choice out of a stream spools it first (`data/spool`).
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.data.sources.account import Account, suffix_of
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
IGNORED_FOLDERS = frozenset(
    (
        *("__MACOSX", "@eaDir", "ground_truth", "thumbnails", "thumbs", "_thumbs"),
        *("lost+found", "System Volume Information", "$RECYCLE.BIN", "#recycle"),
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
        label: class index, -1 for none; in a stream that has yet to meet its classes, a name, number or directory.
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
        account: what was taken and passed over.
        files: all that it is read from, None where that is the file of its name.
    """

    name: str
    classes: tuple[str, ...]
    labels_N: NDArray[np.int64]
    read: Callable[[int], Item]
    account: Account = dataclasses.field(default_factory=Account)
    files: Callable[[], Iterable[Path]] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Items one after the other; `items` starts again from the first at each call.

    Attributes:
        name: what a person calls it, for messages.
        classes: class names by label; None when the end tells them: labels are names, numbers or directories.
        count: number of items, None when only the end tells.
        items: makes the iterator.
        directories: where labels are directories, at the end the part of each that may hold its class, of every
            split.
        known: class names that a person gave; a single folder of such a name is a class.
        account: what was taken and passed over, complete when the items are.
        files: all that it is read from, None where that is the file of its name.
    """

    name: str
    classes: tuple[str, ...] | None
    count: int | None
    items: Callable[[], Iterator[Item]]
    directories: dict[str, str] | None = None
    known: Collection[str] = ()
    account: Account = dataclasses.field(default_factory=Account)
    files: Callable[[], Iterable[Path]] | None = None


Source = Indexed | Stream


def is_image_name(name: str) -> bool:
    """True for a picture's suffix, unless a component is hidden or holds no pictures of its own (thumbnails)."""
    _, dot, suffix = name.rpartition(".")
    if "." + suffix.lower() not in IMAGE_SUFFIXES or not dot:
        return False
    return not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, as macOS's `._0.cls`, or lies in a folder whose contents are never taken."""
    return ignored_folder(name) is not None or name.rpartition("/")[2].startswith(".")


def visible(folder: Path, pattern: str) -> list[Path]:
    """A folder's files of a pattern, sorted; hidden ones do not count."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def ignored_folder(name: str) -> str | None:
    """The component of a path whose contents are never taken: hidden, or what a machine made of other images."""
    folders = name.split("/")[:-1]
    return next((p for p in folders if p in IGNORED_FOLDERS or (p.startswith(".") and p not in (".", ".."))), None)


def reason_of(name: str) -> str:
    """Why `is_image_name` is False, for the account."""
    folder = ignored_folder(name)
    return suffix_of(name) if folder is None else f"file in {folder}/"


def split_of(word: str) -> str | None:
    """The split that a folder's name means: `train`, `train2017`, `seg_train`, `train.X1`, `training_set`."""
    match = _SPLIT_WORD.fullmatch(word.lower())
    return None if match is None else _SPLIT_OF_WORD[match[1]]


_SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
_SPLIT_WORD = re.compile(
    rf"(?:seg[_-]|images?[_-])?({'|'.join(_SPLIT_OF_WORD)})(?:[ ._-]?(?:set|images?|data|x[0-9]*|[0-9]+))*", re.ASCII
)


def no_images(source: str, account: Account) -> UserError:
    """The error for a source without any image, naming what it holds instead."""
    others = ", ".join(f"{count} {reason}" for reason, count in account.passed_over.most_common(4))
    return UserError(
        f"{source} holds no image files" + (f", only {others}." if others else "."),
        "Give one with .jpg, .png, .webp, .bmp, .tif or .gif.",
    )


class MissingSplitError(UserError):
    """A source has no images of a split; `splits` are those that it has."""

    def __init__(self, name: str, split: str, splits: Iterable[str]) -> None:
        words = set(splits)
        self.splits = {split_of(word) for word in words}
        known = sorted(word for word in self.splits if word)
        fix = f"Set split to one of: {', '.join(known) or 'train'}."
        if words and not known:
            fix = f"Call its splits {', '.join(SPLITS)}, not {', '.join(sorted(words))}."
        super().__init__(f"{name} has no images for split {split!r}.", fix)


def check_whole(source: str | Path, split: str) -> None:
    """Refuses a split of a source that is not divided: its images are the train split, or the one that its name says.

    Raises:
        MissingSplitError: else each of its splits would hold the same images.
    """
    named = {_SPLIT_OF_WORD.get(word) for word in re.split(r"[^a-z]+", Path(source).name.lower())}
    if split not in {"train", "unlabeled", *named}:
        raise MissingSplitError(str(source), split, ())


def files_of_split(paths: Sequence[Path], split: str, folder: Path, outside: Counter[str]) -> list[Path]:
    """Of a folder's files those of one split, sorted; recognized by a word in their path below the folder.

    Where none holds such a word, all are the train split; else those without are counted in `outside`.
    """
    words: dict[Path, str | None] = {}
    for path in paths:
        tokens = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        words[path] = next((_SPLIT_OF_WORD[token] for token in tokens if token in _SPLIT_OF_WORD), None)
    if set(words.values()) <= {None} and split in ("train", "unlabeled"):
        return sorted(paths)
    chosen = sorted(path for path in paths if words[path] == split)
    if not chosen:
        raise MissingSplitError(str(folder), split, {word for word in words.values() if word})
    outside.update(f"{path.suffix.lower()} file whose name says no split" for path in paths if words[path] is None)
    return chosen


def names_next_to(path: Path) -> tuple[str, ...] | None:
    """Class names in the manifest of a converted file or folder, None when there is no such manifest."""
    try:
        names = json.loads(path.with_name(path.name + ".json").read_text())["classes"]
        return tuple(str(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def no_labels(count: int) -> NDArray[np.int64]:
    """int64 (count,) of -1."""
    return np.full(count, -1, np.int64)


def check_known(name: str, found: Iterable[str], classes: Iterable[str]) -> None:
    """UserError for classes of a source that are not in the given list."""
    unknown = set(found) - set(classes)
    if unknown:
        raise UserError(
            f"{name} has classes that are not in the given list: {', '.join(sorted(unknown))}.",
            "Give a list of classes that names them all.",
        )


def renumber(source: Indexed, classes: tuple[str, ...]) -> Indexed:
    """The same items with labels that index `classes`."""
    check_known(source.name, source.classes, classes)
    index = {name: i for i, name in enumerate(classes)}
    table = np.array([index[name] for name in source.classes] + [-1], np.int64)
    labels_N = table[source.labels_N]  # -1 picks the last entry, -1

    def read(index: int) -> Item:
        return source.read(index)._replace(label=int(labels_N[index]))

    return dataclasses.replace(source, classes=classes, labels_N=labels_N, read=read)
