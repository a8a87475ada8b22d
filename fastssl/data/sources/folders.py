"""Folders of image files, with class sub-folders or flat, with or without train/ and test/ above them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastssl.data.sources.base import MAX_ITEM_BYTES, Indexed, Item, choose_split, is_image_name
from fastssl.errors import UserError


def folder_source(path: Path, split: str) -> Indexed:
    """Every image file under `path`, sorted by name; classes are those of all splits together.

    Symbolic links are followed (a folder on disk is its owner's own affair), loops once.
    """
    names = list(_walk(path))
    chosen, classes, labels_N = choose_split(str(path), names, split)

    def read(index: int) -> Item:
        name = names[chosen[index]]
        return Item(name, read_file(path / name), int(labels_N[index]))

    return Indexed(str(path), classes, labels_N, read)


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all image files, links followed, each folder entered once."""
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        try:
            status = os.stat(root / relative)
            with os.scandir(root / relative) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(
                f"{str(root / relative)!r} cannot be read: {error.strerror}", "Mend its access rights."
            ) from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in found:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    pending.append(name)
            elif is_image_name(entry.name):
                yield name


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
    except OSError as error:
        return ValueError(f"{str(path)!r} cannot be read: {error.strerror}")
