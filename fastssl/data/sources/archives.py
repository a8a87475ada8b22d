"""Archives of image folders, read where they lie: tar as a stream, zip by its table of contents."""

import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastssl.data.sources.base import (
    MAX_ITEM_BYTES,
    Indexed,
    Item,
    Place,
    Stream,
    check_places,
    choose_split,
    is_image_name,
    missing_split,
    no_labels,
    place_of,
)
from fastssl.data.sources.tar import leaves, read_tar
from fastssl.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


def tar_source(path: Path, split: str) -> Stream:
    """A tar archive of a folder. Its classes are known at its end, so labels arrive as directories."""
    directories: set[str] = set()
    return Stream(str(path), None, None, lambda: _tar_items(path, split, directories), directories)


def _tar_items(path: Path, split: str, directories: set[str]) -> Iterator[Item]:
    places: dict[str, Place] = {}
    found: set[str | None] = set()
    count = 0
    for name, data in read_tar(path, max_bytes=MAX_ITEM_BYTES, wanted=is_image_name):
        if isinstance(data, Exception) and leaves(name):
            yield Item(name, data)
            continue
        directory = name.rpartition("/")[0]
        if directory not in places:
            places[directory] = place_of(directory)
            found = _enter(str(path), places, directories, yielded=count if split in ("train", "unlabeled") else 0)
        place = places[directory]
        if place.split == split or (found == {None} and split in ("train", "unlabeled")):
            count += 1
            yield Item(name, data, -1 if split == "unlabeled" else place.rest)
    if not found:
        raise UserError(f"{path} holds no image files", "Give an archive with .jpg, .png, .webp, .bmp, .tif or .gif.")
    if not count:
        raise missing_split(str(path), split, (s for s in found if s is not None))


def _enter(source: str, places: dict[str, Place], directories: set[str], *, yielded: int) -> set[str | None]:
    """Look at all directories met so far, after a new one: sets those that name classes, returns the splits."""
    check_places(source, places.values())
    found = {place.split for place in places.values()}
    outside = found == {None}
    if yielded and not outside and not any(place.split for place in list(places.values())[:-1]):
        raise UserError(
            f"{source} has images before and beside its split folders",
            "Make an archive with train/ and test/ alone, or with neither.",
        )
    directories.clear()
    directories.update(p.rest for p in places.values() if p.split != "unlabeled" and (outside or p.split is not None))
    return found


def zip_source(path: Path, split: str) -> Indexed:
    """A zip archive of a folder; members are inflated one at a time, never beyond the stated and allowed size."""
    try:
        archive = zipfile.ZipFile(path)
        members = [
            m for m in archive.infolist() if not m.is_dir() and (is_image_name(m.filename) or leaves(m.filename))
        ]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a zip archive: {error}", "Fetch or make it again.") from error
    sound = [member for member in members if not leaves(member.filename)]
    chosen, classes, labels_N = choose_split(str(path), [member.filename for member in sound], split)
    # names that leave the archive belong to no split: whoever reads any of them hears of all
    taken = [sound[i] for i in chosen] + [member for member in members if leaves(member.filename)]
    labels_N = np.concatenate([labels_N, no_labels(len(taken) - len(chosen))])
    lock = threading.Lock()

    def read(index: int) -> Item:
        return Item(taken[index].filename, _inflate(archive, taken[index], lock), int(labels_N[index]))

    return Indexed(str(path), classes, labels_N, read)


def _inflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo, lock: threading.Lock) -> bytes | Exception:
    name = member.filename
    if leaves(name):
        return ValueError(f"{name!r} leaves the archive's folder")
    if member.external_attr >> 28 == 0o12:
        return ValueError(f"{name!r} is a symbolic link")
    if member.flag_bits & 1:
        return ValueError(f"{name!r} is encrypted")
    if member.file_size > MAX_ITEM_BYTES:
        return ValueError(f"{name!r} has {member.file_size} bytes, the limit is {MAX_ITEM_BYTES}")
    try:
        with lock, archive.open(member) as file:  # zipfile moves one shared file position
            return file.read(member.file_size)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        return ValueError(f"{name!r} cannot be read: {error}")
