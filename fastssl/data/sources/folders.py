"""Folders of image files, with class sub-folders or flat, with or without train/ and test/ above or below them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import (
    IGNORED_FOLDERS,
    MAX_ITEM_BYTES,
    Indexed,
    Item,
    is_image_name,
    no_labels,
    reason_of,
)
from fastssl.data.sources.choices import Choices
from fastssl.data.sources.places import choose_split
from fastssl.errors import UserError


def folder_source(path: Path, split: str, choices: Choices) -> Indexed:
    """Every image file under `path`, sorted by name; classes are those of all splits together.

    Symbolic links are followed (a folder on disk is its owner's own affair), each folder is entered once.
    """
    account, unreadable = Account(), dict[str, str]()
    names = list(walk(path, account, unreadable))
    if not names and unreadable:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"{str(path / name)!r} cannot be read: {reason}.", "Fix its permissions.")
    chosen, classes, labels_N = choose_split(str(path), names, split, account=account, known=choices.classes)
    # what an unreadable folder holds, and of which split, nobody knows: it is listed with every one
    taken = [*(names[i] for i in chosen), *unreadable]
    labels_N = np.concatenate([labels_N, no_labels(len(unreadable))])

    def read(index: int) -> Item:
        name = taken[index]
        if name in unreadable:
            return Item(name, ValueError(f"{str(path / name)!r} cannot be read: {unreadable[name]}"))
        return Item(name, read_file(path / name), int(labels_N[index]))

    return Indexed(str(path), classes, labels_N, read, account, lambda: (path / name for name in taken))


def walk(root: Path, account: Account, unreadable: dict[str, str]) -> Iterator[str]:
    """Relative names of all image files, links followed, each folder entered once, under its first name.

    Folders that cannot be read are added to `unreadable`, by name with the reason.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()  # links wait until no folder is left, whatever the order on disk
    while folders or links:
        relative = (folders or links).pop()
        try:
            status = os.stat(root / relative)
            with os.scandir(root / relative) as entries:
                listed = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            unreadable[relative] = error.strerror or str(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            account.passed_over["link to a folder that was entered already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        below: tuple[list[str], list[str]] = ([], [])
        for entry in listed:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if not is_folder(entry):
                if is_image_name(name):
                    yield name
                else:
                    account.passed_over[reason_of(name)] += 1
            elif entry.name.startswith("."):
                account.passed_over["hidden folder"] += 1
            elif entry.name in IGNORED_FOLDERS:
                account.passed_over[f"folder {entry.name}/"] += 1
            else:
                below[entry.is_symlink()].append(name)
        folders.extend(reversed(below[False]))
        links.extend(reversed(below[True]))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_file(path: str | os.PathLike[str]) -> bytes | Exception:
    """Contents of a regular file of at most MAX_ITEM_BYTES, or the reason why not."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return ValueError(f"{str(path)!r} is not a regular file")
        if status.st_size > MAX_ITEM_BYTES:
            return ValueError(f"{str(path)!r} has {status.st_size} bytes, the limit is {MAX_ITEM_BYTES}")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        return ValueError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}")
