"""WebDataset shards: tar files whose consecutive members share a name up to the first dot, an image and its label."""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import (
    MAX_ITEM_BYTES,
    Item,
    Stream,
    is_hidden,
    is_image_name,
    names_next_to,
    no_images,
    reason_of,
    visible,
)
from fastssl.data.sources.choices import Choices, choice
from fastssl.data.sources.labels import read_label
from fastssl.data.sources.tar import TAR_SUFFIXES, leaves, read_tar
from fastssl.errors import UserError

_LABELS = ("cls", "json")
LABEL_KEYS = ("label", "cls", "class", "target", "label_id", "class_id", "category", "class_name", "label_name")
_PEEK = 16  # members that tell whether a tar holds samples or a folder
_MOST_IMAGES = 8  # of one sample

Member = bytes | Exception


def is_webdataset(path: Path) -> bool:
    """Whether this tar holds samples: among its first members an image next to a .cls, or a .json with a label."""
    images: set[str] = set()
    labeled: set[str] = set()
    members = read_tar(path, max_bytes=1 << 20, wanted=lambda name: not is_hidden(name))
    for _, (name, data) in zip(range(_PEEK), members, strict=False):
        key, suffix = _split(name)
        if suffix == "cls" or (suffix == "json" and isinstance(data, bytes) and _holds_label(data)):
            labeled.add(key)
        elif is_image_name(name):
            images.add(key)
    return bool(images & labeled)


def webdataset_source(paths: list[Path], split: str, choices: Choices, *, name: str) -> Stream:
    """The samples of `paths`, shard after shard.

    Args:
        paths: shards.
        split: "unlabeled" leaves the labels out.
        choices: `image_key` says which image of a sample to take.
        name: what a person calls them.
    """
    labels_wanted = split != "unlabeled"
    account = Account()
    classes = names_next_to(paths[0].parent) if labels_wanted else ()

    def items() -> Iterator[Item]:
        account.clear()
        return _items(paths, labels_wanted, choices.image_key, account)

    return Stream(name, classes, None, items, account=account, files=lambda: paths)


def _items(paths: Iterable[Path], labels_wanted: bool, image_key: str | None, account: Account) -> Iterator[Item]:
    count, path = 0, Path()
    for path in paths:
        members = read_tar(path, max_bytes=MAX_ITEM_BYTES, wanted=functools.partial(_is_wanted, account))
        for key, parts in _samples(members):
            suffix = _image_suffix(f"{path.name}/{key}", parts, image_key)
            if suffix is None:
                account.passed_over["sample without an image"] += 1
                continue
            count += 1
            account.image_from = image_key
            account.passed_over["further image of a sample"] += sum(map(_is_image_suffix, parts)) - 1
            image, label = parts[suffix], _label(parts, account) if labels_wanted else -1
            if isinstance(label, Exception):
                image, label = label, -1
            yield Item(f"{path.name}/{key}", image, label)
    account.passed_over += type(account.passed_over)()  # drops counts of zero
    if not count:
        raise no_images(str(path), account)


def _samples(members: Iterable[tuple[str, Member]]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Consecutive members of one key, as {suffix: contents}; a refused name is a sample of its own.

    Where no member of a key has a suffix without a dot, the names hold dots themselves (`photo.000.png`): every image
    is a sample, with the members that share its name up to the last dot.
    """
    current: str | None = None
    parts: dict[str, Member] = {}
    stem = ""
    for name, data in members:
        key, suffix = _split(name)
        before, stem = stem, name.rpartition(".")[0]
        # Where names hold dots, one key may be the whole shard: it is cut, but not within a sample of `_undotted`.
        most = 4 * _MOST_IMAGES if stem != before else 64 * _MOST_IMAGES
        if key != current or leaves(name) or len(parts) >= most:
            if current is not None:
                yield from _undotted(current, parts)
            current, parts = key, {}
        parts["jpg" if leaves(name) else suffix] = data if suffix not in parts else _twice(name)
    if current is not None:
        yield from _undotted(current, parts)


def _twice(name: str) -> Exception:
    return ValueError(f"{name!r} is one of two members of its sample that differ in nothing or in case")


def _undotted(key: str, parts: dict[str, Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    if any("." not in suffix for suffix in parts) or len(parts) < 2:
        yield key, parts
        return
    by_name: dict[str, dict[str, Member]] = {}
    for suffix, data in parts.items():
        stem, _, last = suffix.rpartition(".")
        by_name.setdefault(f"{key}.{stem}", {})[last] = data
    yield from by_name.items()


def _image_suffix(key: str, parts: dict[str, Member], wanted: str | None) -> str | None:
    """The suffix of a sample's image: the one asked for, else the only one, else the only plain one.

    Raises:
        UserError: when several would do.
    """
    images = [suffix for suffix in parts if _is_image_suffix(suffix)]
    if wanted is not None:
        return wanted.lower() if wanted.lower() in parts else None
    plain = [suffix for suffix in images if "." not in suffix]
    best = images if len(images) < 2 else plain
    if len(images) > 1 and len(best) != 1:
        raise UserError(
            f"Sample {key} holds several images: {', '.join(images[:_MOST_IMAGES])}.",
            f"Say which one to take, such as {choice('image_key', images[0])}.",
        )
    return best[0] if best else None


def _label(parts: dict[str, Member], account: Account) -> int | str | Exception:
    """From .cls, a number or a name, or from .json's label; -1 when there is neither, why when it cannot be read."""
    refused = parts.get("cls", parts.get("json"))
    if isinstance(refused, Exception):
        return ValueError(f"its label cannot be read: {refused}")
    try:
        text = parts.get("cls")
        if isinstance(text, bytes):
            account.label_from = ".cls"
            label = read_label(text)
            return int(label) if isinstance(label, str) and re.fullmatch(r"\d{1,9}", label, re.ASCII) else label
        text = parts.get("json")
        if isinstance(text, bytes):
            entry = _label_key(text)
            if entry is None:
                account.passed_over["json without a label"] += 1
                return -1
            account.label_from = f".json, {entry[0]}"
            return read_label(entry[1])
    except (ValueError, RecursionError) as error:
        return ValueError(f"its label cannot be read: {error}")
    return -1


def _label_key(text: bytes) -> tuple[str, object] | None:
    """Key and value of the label in a JSON object, None where it has none; ValueError for no JSON."""
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(record, dict):
        return None
    return next(((key, record[key]) for key in LABEL_KEYS if record.get(key) is not None), None)


def _holds_label(text: bytes) -> bool:
    try:
        return _label_key(text) is not None
    except ValueError:
        return False


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: WebDataset cuts at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_image_suffix(suffix: str) -> bool:
    return is_image_name("x." + suffix)


def _is_wanted(account: Account, name: str) -> bool:
    if is_image_name(name) or (name.lower().endswith((".cls", ".json")) and not is_hidden(name)):
        return True
    account.passed_over[reason_of(name)] += 1
    return False


def shard_paths(path: Path) -> list[Path]:
    """The shards that `path` means: a folder's .tar files, a `name-{000..012}.tar` range, or one file."""
    if path.is_dir():
        return visible(path, "*.tar")
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name)
    if match is None:
        return [path]
    head, first, last, tail = match.groups()
    paths = [path.with_name(f"{head}{i:0{len(first)}d}{tail}") for i in range(int(first), int(last) + 1)]
    absent = [p for p in paths if not p.exists()]
    if absent or not paths:
        raise UserError(f"{path} means shards that do not exist: {absent[0] if absent else 'none'}.", "Fix the range.")
    return paths


def other_archives(folder: Path, shards: list[Path]) -> Counter[str]:
    """How many archives lie in a folder of shards that are none of them, by the reason."""
    others = set(visible(folder, "**/*.t*")).difference(shards)
    names = [path.relative_to(folder).as_posix() for path in others if path.name.lower().endswith(TAR_SUFFIXES)]
    return Counter("archive in a folder below" if "/" in name else "archive that is no plain .tar" for name in names)


def check_shards(folder: Path, paths: list[Path]) -> None:
    """UserError for tars that may as well be one class each: without labels inside, and not numbered as shards are."""
    numbers = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in paths]
    series = sorted((m[1], int(m[2])) for m in numbers if m)
    numbered = len(series) == len(paths) and series[-1][1] < 2 * len(paths)
    if len(paths) < 2 or numbered or names_next_to(folder) is not None or is_webdataset(paths[0]):
        return
    raise UserError(
        f"{folder} holds {len(paths)} tar files without labels inside, such as {paths[0].name}: they can be read as "
        "shards of unlabeled images, or as one tar per class.",
        "Unpack each into a folder of its class, or number them as shards: name-000000.tar.",
    )
