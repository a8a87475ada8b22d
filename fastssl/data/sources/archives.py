"""Archives of image folders, read where they lie: tar as a stream, zip by its table of contents."""

import threading
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from fastssl.data.decode import reason
from fastssl.data.sources.account import Account
from fastssl.data.sources.base import (
    MAX_ITEM_BYTES,
    Indexed,
    Item,
    Stream,
    is_image_name,
    no_labels,
    reason_of,
)
from fastssl.data.sources.choices import Choices
from fastssl.data.sources.places import (
    choose_split,
    is_divided,
    labeled_directories,
    outside_of,
    split_places,
)
from fastssl.data.sources.tar import leaves, read_tar

_COPY = "earlier file of the same name"


def tar_source(path: Path, split: str, choices: Choices) -> Stream:
    """A tar archive of a folder. Its classes are known once it is read, so labels arrive as directories."""
    directories: dict[str, str] = {}
    account = Account()

    def items() -> Iterator[Item]:
        account.clear()
        return _tar_items(path, split, directories, choices.classes, account)

    return Stream(str(path), None, None, items, directories, choices.classes, account)


def _tar_items(
    path: Path, split: str, directories: dict[str, str], known: Collection[str], account: Account
) -> Iterator[Item]:
    """Reads the archive twice: only its end tells which folders all images share, and so where its splits begin."""
    counts, copies = _tar_directories(path, account)
    places = split_places(str(path), counts, split, account)
    key = split if is_divided(places) else None
    if key is not None:
        for directory, count in counts.items():
            account.splits[outside_of(places[directory])] += count
    directories.update(labeled_directories(str(path), split, places, known=known))
    for name, data in read_tar(path, max_bytes=MAX_ITEM_BYTES, wanted=is_image_name):
        directory = name.rpartition("/")[0]
        if isinstance(data, Exception) and leaves(name):
            yield Item(name, data)
        elif _is_earlier_copy(name, copies):
            account.passed_over[_COPY] += 1
            if key is not None:
                account.splits[outside_of(places[directory])] -= 1
        elif places[directory].split == key:
            yield Item(name, data, -1 if split == "unlabeled" else directory)


def _tar_directories(path: Path, account: Account) -> tuple[Counter[str], dict[int, int]]:
    """Number of images by directory, and by hash of the name where several have it; no header is kept."""
    counts, hashes, is_wanted = Counter[str](), array("q"), counting(account)

    def count(name: str) -> bool:
        if is_wanted(name):
            counts[name.rpartition("/")[0]] += 1
            hashes.append(hash(name))
        return False

    for _ in read_tar(path, max_bytes=0, wanted=count):
        pass
    names, copies = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    return counts, dict(zip(names[copies > 1].tolist(), copies[copies > 1].tolist(), strict=True))


def _is_earlier_copy(name: str, copies: dict[int, int]) -> bool:
    """Whether another member of this name follows, which would replace this one; counts `copies` down."""
    left = copies.get(hash(name), 1) - 1
    if left:
        copies[hash(name)] = left
    return left > 0


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
    last = {name: member for member, name in members}
    account.passed_over += Counter({_COPY: len(members) - len(last)})
    members = [(member, name) for member, name in members if last[name] is member]
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
