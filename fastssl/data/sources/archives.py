"""Archives of image folders, read where they lie: tar as a stream, zip by its table of contents."""

import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastssl.data.decode import reason
from fastssl.data.sources.account import Account
from fastssl.data.sources.base import (
    MAX_ITEM_BYTES,
    Indexed,
    Item,
    MissingSplitError,
    Place,
    Stream,
    check_places,
    choose_split,
    classes_above,
    is_image_name,
    labeled_directories,
    no_images,
    no_labels,
    place_of,
    reason_of,
)
from fastssl.data.sources.choices import Choices
from fastssl.data.sources.tar import leaves, read_tar
from fastssl.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


def tar_source(path: Path, split: str, choices: Choices) -> Stream:
    """A tar archive of a folder. Its classes are known at its end, so labels arrive as directories."""
    directories: dict[str, str] = {}
    account = Account()

    def items() -> Iterator[Item]:
        account.clear()
        return _tar_items(path, split, directories, account)

    return Stream(str(path), None, None, items, directories, choices.classes, account)


def _tar_items(path: Path, split: str, directories: dict[str, str], account: Account) -> Iterator[Item]:
    source, places, any_split = str(path), dict[str, Place](), False
    count = 0
    for name, data in read_tar(path, max_bytes=MAX_ITEM_BYTES, wanted=counting(account)):
        if isinstance(data, Exception) and leaves(name):
            yield Item(name, data)
            continue
        directory = name.rpartition("/")[0]
        if directory not in places:
            places[directory] = place_of(directory)
            check_places(source, places.values())
            if places[directory].split is not None:
                check_nothing_before(source, 0 if any_split or split not in ("train", "unlabeled") else count)
                any_split = True
        place = places[directory]
        if any_split:
            account.splits[place.split or "outside of the splits"] += 1
        if place.split == split or (not any_split and split in ("train", "unlabeled")):
            count += 1
            yield Item(name, data, -1 if split == "unlabeled" else directory)
    if not places:
        raise no_images(source, account)
    if not count:
        raise MissingSplitError(source, split, {place.split for place in places.values() if place.split is not None})
    places = classes_above(places)
    labeled = labeled_directories(source, split, places.values())
    directories.update({directory: place.rest for directory, place in places.items() if place.rest in labeled})


def check_nothing_before(source: str, count: int) -> None:
    """UserError when `count` images came before the first split folder: they were taken for the train split."""
    if count:
        raise UserError(
            f"{source} has images before its split folders and next to them.",
            "Make an archive with train/ and test/ alone, or with neither.",
        )


def counting(account: Account) -> Callable[[str], bool]:
    """`is_image_name`, which counts what it passes over."""

    def wanted(name: str) -> bool:
        if is_image_name(name):
            return True
        account.passed_over[reason_of(name)] += 1
        return False

    return wanted


def zip_source(path: Path, split: str, choices: Choices) -> Indexed:
    """A zip archive of a folder; members are inflated one at a time, never beyond the stated and allowed size."""
    account = Account()
    archive, wanted = zipfile.ZipFile(path), counting(account)
    members = [(m, _name_of(m)) for m in archive.infolist() if not m.is_dir()]
    members = [(m, name) for m, name in members if leaves(name) or wanted(name)]
    sound = [(member, name) for member, name in members if not leaves(name)]
    names = [name for _, name in sound]
    chosen, classes, labels_N = choose_split(str(path), names, split, account=account, known=choices.classes)
    # names that leave the archive belong to no split: they are listed with every one
    taken = [sound[i] for i in chosen] + [(member, name) for member, name in members if leaves(name)]
    labels_N = np.concatenate([labels_N, no_labels(len(taken) - len(chosen))])
    lock = threading.Lock()

    def read(index: int) -> Item:
        member, name = taken[index]
        return Item(name, _inflate(archive, member, name, lock), int(labels_N[index]))

    return Indexed(str(path), classes, labels_N, read, account=account)


def _name_of(member: zipfile.ZipInfo) -> str:
    """With slashes: some Windows programs write back-slashes."""
    return member.filename if "/" in member.filename else member.filename.replace("\\", "/")


def _inflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, lock: threading.Lock) -> bytes | Exception:
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
    except Exception as error:  # caught here and not by the guard, which knows the member's position alone
        return ValueError(f"{name!r} cannot be read: {reason(error)}")
