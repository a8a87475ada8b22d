"""Where the images of a folder or archive stand: in which split, and in the folder of which class."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import MissingSplitError, no_images, no_labels, split_of
from fastssl.data.sources.labels import normal_name
from fastssl.errors import UserError


class Place(NamedTuple):
    """Where a directory stands: the split it belongs to, what lies above that, and the rest of its path."""

    split: str | None
    parent: str
    rest: str


def places_of(directories: Collection[str]) -> dict[str, Place]:
    """The place of each directory.

    The folders that all directories share, such as the home/me/pets/ of an archive, say nothing: a split is recognized
    by the first or second component below them. Where these are no splits, the shared folders themselves may lead into
    one (train/ alone): the first two or the last two of them.
    """
    parts = {directory: PurePosixPath(directory).parts for directory in directories}
    shared = shared_folders(parts.values())
    below = len(shared)
    places = {directory: place_at(p, (below, below + 1)) for directory, p in parts.items()}
    inner = [places[directory].split for directory, p in parts.items() if len(p) > below]
    ends = sorted({0, 1, below - 2, below - 1} & set(range(below)))
    if (inner and None not in inner) or place_at(shared, ends).split is None:
        return places
    return {directory: place_at(p, ends) for directory, p in parts.items()}


def shared_folders(paths: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that lie on every path, but for paths that end before."""
    longest = max(paths, key=len, default=())
    for depth, part in enumerate(longest):
        if any(len(p) > depth and p[depth] != part for p in paths):
            return longest[:depth]
    return longest


def place_at(parts: tuple[str, ...], depths: Iterable[int]) -> Place:
    """The place of a directory whose split is called at the first of these depths that names one."""
    for depth in depths:
        if depth < len(parts) and (split := split_of(parts[depth])) is not None:
            return Place(split, "/".join(parts[:depth]), "/".join(parts[depth + 1 :]))
    return Place(None, "/".join(parts), "/".join(parts))


def check_places(source: str, places: Collection[Place]) -> None:
    """UserError when class folders stand next to train/ or test/: is `train` a split there, or a class?"""
    parents = {place.parent for place in places if place.split is not None}
    above = {"", *parents, *(str(folder) for parent in parents for folder in PurePosixPath(parent).parents)}
    outside = sorted(place.rest for place in places if place.split is None and place.rest not in above)
    if parents and outside:
        raise UserError(
            f"{source} has images in split folders and in others next to them, such as {outside[0]!r}.",
            "Give one with train/ and test/ alone, or rename a class that is called like a split.",
        )
    inside = sorted(f"{place.parent}/.../{place.rest}" for place in places if place.split and place.rest)
    if len(parents) > 1 and inside:
        raise UserError(
            f"{source} has folders above its split folders and below them, such as {inside[0]!r}: "
            "the classes are either the ones or the others.",
            "Give one of the folders above, or one with class folders on one side of train/ and test/ alone.",
        )


def classes_above(places: dict[str, Place]) -> dict[str, Place]:
    """The same places, with the folders above the splits as their classes where those are several (cat/train)."""
    if len({place.parent for place in places.values() if place.split}) < 2:
        return places
    return {d: Place(p.split, "", p.parent) if p.split else p for d, p in places.items()}


def wrapper(paths: Collection[tuple[str, ...]], *, known: Collection[str] = ()) -> tuple[str, ...]:
    """What all paths have in common, up to a component that is a `known` class."""
    first = next(iter(paths), ())
    common = 0
    while paths and all(len(p) > common for p in paths):
        here = {normal_name(p[common]) for p in paths}
        if len(here) > 1 or here <= set(known):
            break
        common += 1
    return first[:common]


def class_labels(directories: Iterable[str], *, known: Collection[str] = ()) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, sorted, and the label of each directory.

    What all directories have in common is a wrapper, unless it is a `known` class; the component after it is the
    class, and deeper ones are the class's own affair. Images right in the wrapper have no class: -1.
    """
    parts = {directory: PurePosixPath(directory).parts for directory in directories}
    common = len(wrapper(parts.values(), known=known))
    class_of = {d: normal_name(p[common]) if len(p) > common else None for d, p in parts.items()}
    classes = tuple(sorted({name for name in class_of.values() if name is not None}))
    index = {name: i for i, name in enumerate(classes)}
    return classes, {directory: -1 if name is None else index[name] for directory, name in class_of.items()}


def check_shared(source: str, split: str, by_split: Mapping[str, Collection[str]]) -> None:
    """UserError when a split's class folders have no name in common with those of train."""
    train = set(class_labels(by_split.get("train", ()))[0])
    own = set(class_labels(by_split.get(split, ()))[0]) or {
        normal_name(part) for d in by_split.get(split, ()) for part in PurePosixPath(d).parts
    }
    if split not in ("train", "unlabeled") and train and own and not own & train:
        raise UserError(
            f"{source}: the folders of split {split!r} ({', '.join(sorted(own)[:3])}) are none of train's classes "
            f"({', '.join(sorted(train)[:3])}).",
            "Sort its images into folders of train's classes, or list them with their labels in a .csv.",
        )


def choose_split(
    source: str, names: Sequence[str], split: str, *, account: Account, known: Collection[str] = ()
) -> tuple[list[int], tuple[str, ...], NDArray[np.int64]]:
    """Positions in `names` (sorted by name) of one split's images, the class names, and the chosen labels_N.

    Where train/, test/ and so on exist, images right next to those folders belong to none; where they do not, all
    images are the train split. The classes are those of all labeled splits together that share one with train, so
    that a class missing from one does not renumber the others.
    """
    directories = [name.rpartition("/")[0] for name in names]
    places = split_places(source, set(directories), split, account)
    account.splits.update(outside_of(places[directory]) for directory in directories if is_divided(places))
    key = split if is_divided(places) else None
    chosen = [i for i, directory in enumerate(directories) if places[directory].split == key]
    chosen.sort(key=names.__getitem__)
    if split == "unlabeled":
        return chosen, (), no_labels(len(chosen))
    labeled = labeled_directories(source, split, places, known=known)
    classes, label_of = class_labels(labeled.values(), known=known)
    labels = [label_of[labeled[directories[i]]] for i in chosen]
    return chosen, classes, np.array(labels, np.int64)


def split_places(source: str, directories: Collection[str], split: str, account: Account) -> dict[str, Place]:
    """The place of each directory; UserError where there are none, cannot be told apart, or lack the split."""
    if not directories:
        raise no_images(source, account)
    places = places_of(directories)
    check_places(source, places.values())
    places = classes_above(places)
    splits = {place.split for place in places.values()}
    if split not in splits and (is_divided(places) or split not in ("train", "unlabeled")):
        raise MissingSplitError(source, split, (s for s in splits if s is not None))
    return places


def is_divided(places: Mapping[str, Place]) -> bool:
    """Whether there are splits."""
    return any(place.split is not None for place in places.values())


def outside_of(place: Place) -> str:
    """How an image there is counted."""
    return place.split or "outside of the splits"


def labeled_directories(
    source: str, split: str, places: Mapping[str, Place], *, known: Collection[str] = ()
) -> dict[str, str]:
    """By directory the part that may hold its class.

    Directories of every split that has a class of train, without the folders around each split's classes; all
    directories where there are no splits.
    """
    if not is_divided(places):
        labeled = {directory: place.rest for directory, place in places.items()}
    else:
        by_split: dict[str, set[str]] = defaultdict(set)
        for place in places.values():
            if place.split is not None and place.split != "unlabeled":
                by_split[place.split].add(place.rest)
        check_shared(source, split, by_split)
        train = set(class_labels(by_split.get("train", ()))[0])
        shared = {s: d for s, d in by_split.items() if s in ("train", split) or not train or shares(d, train)}
        depths = wrapper_depths(shared, known)
        labeled = {
            directory: "/".join(PurePosixPath(place.rest).parts[depths[place.split] :])
            for directory, place in places.items()
            if place.split in shared
        }
    check_classes(source, class_labels(labeled.values(), known=known)[0], known)
    return labeled


def wrapper_depths(by_split: Mapping[str, Collection[str]], known: Collection[str]) -> dict[str | None, int]:
    """How many folders lie around the classes of each split: train/train/cat and test/images/cat have one each.

    A split's only folder is a class where other splits have a class of its name, and a wrapper where it repeats the
    split's.
    """
    names = {*known, *(name for d in by_split.values() for name in class_labels(d, known=known)[0])}
    depths: dict[str | None, int] = {}
    for split, directories in by_split.items():
        paths = [PurePosixPath(d).parts for d in directories]
        around = wrapper(paths, known=names)
        if not names - set(known) and around == wrapper(paths):  # nothing says whether train/cat is a class
            around = tuple(itertools.takewhile(lambda part, own=split: split_of(part) == own, around))  # type: ignore[misc]
        depths[split] = len(around)
    return depths


def check_classes(source: str, classes: Collection[str], known: Collection[str]) -> None:
    """UserError where the classes are splits: train/ and test/ at a depth where they are not looked for."""
    words = {split_of(name): name for name in classes if name not in known and split_of(name) is not None}
    if len(words) > 1:
        raise UserError(
            f"{source} has folders called {' and '.join(sorted(words.values()))} where its class folders are.",
            "Give the folder that holds them, or an archive of it, or name them as classes.",
        )


def shares(directories: Collection[str], classes: Collection[str]) -> bool:
    """Whether any component of the directories is one of the classes."""
    return any(normal_name(part) in classes for d in directories for part in PurePosixPath(d).parts)
