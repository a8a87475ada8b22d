"""WebDataset shards: tar files whose members share a name up to the first dot, an image and its label."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastssl.data.sources.base import MAX_ITEM_BYTES, Item, Stream, is_image_name, names_beside
from fastssl.data.sources.tar import leaves, read_tar
from fastssl.errors import UserError

_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "target")
_PEEK = 16  # members that tell whether a tar holds samples or a folder


def is_webdataset(path: Path) -> bool:
    """Whether this tar holds samples: an image with a .cls or .json of the same name among its first members."""
    names: list[str] = []
    for name, _ in read_tar(path, max_bytes=0, wanted=lambda name: True):
        names.append(name)
        if len(names) == _PEEK:
            break
    labeled = {_split(name)[0] for name in names if _split(name)[1] in _LABELS}
    return any(is_image_name(name) and _split(name)[0] in labeled for name in names)


def webdataset_source(paths: list[Path], split: str, *, name: str) -> Stream:
    """The samples of `paths`, shard after shard.

    Args:
        paths: shards.
        split: "unlabeled" leaves the labels out.
        name: what a person calls them.
    """
    labels_wanted = split != "unlabeled"
    directories: set[str] = set()
    classes = names_beside(paths[0].parent) if labels_wanted else ()
    return Stream(name, classes, None, lambda: _items(paths, labels_wanted, directories), directories)


def _items(paths: Iterable[Path], labels_wanted: bool, directories: set[str]) -> Iterator[Item]:
    for path in paths:
        members = read_tar(path, max_bytes=MAX_ITEM_BYTES, wanted=_is_wanted)
        for key, parts in _samples(members):
            image = next((data for suffix, data in parts.items() if is_image_name("x." + suffix)), None)
            if image is None:
                continue
            label = _label(parts) if labels_wanted else -1
            if isinstance(label, str):
                directories.add(label)
            if isinstance(label, Exception):
                image, label = label, -1
            yield Item(f"{path.name}/{key}", image, label)


def _samples(
    members: Iterable[tuple[str, bytes | Exception]],
) -> Iterator[tuple[str, dict[str, bytes | Exception]]]:
    """Consecutive members of one key, as {suffix: contents}; a refused name is a sample of its own."""
    current: str | None = None
    parts: dict[str, bytes | Exception] = {}
    for name, data in members:
        key, suffix = _split(name)
        if key != current or leaves(name):
            if parts:
                assert current is not None
                yield current, parts
            current, parts = key, {}
        parts["jpg" if leaves(name) else suffix] = data
    if parts and current is not None:
        yield current, parts


def _label(parts: dict[str, bytes | Exception]) -> int | str | Exception:
    """From .cls, a number or a name, or from .json's label; -1 when there is neither."""
    try:
        text = parts.get("cls")
        if isinstance(text, bytes):
            word = text.decode("utf-8").strip()
            return int(word) if re.fullmatch(r"-?\d{1,9}", word) else word
        text = parts.get("json")
        record = json.loads(text) if isinstance(text, bytes) else {}
    except (ValueError, RecursionError) as error:
        return ValueError(f"its label cannot be read: {error}")
    found = next((record[key] for key in _LABEL_KEYS if key in record), -1) if isinstance(record, dict) else -1
    return found if isinstance(found, int | str) else -1


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: WebDataset cuts at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_wanted(name: str) -> bool:
    return is_image_name(name) or _split(name)[1] in _LABELS


def shard_paths(path: Path) -> list[Path]:
    """The shards that `path` means: a folder's .tar files, a `name-{000..012}.tar` range, or one file."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name)
    if match is None:
        return [path]
    head, first, last, tail = match.groups()
    paths = [path.with_name(f"{head}{i:0{len(first)}d}{tail}") for i in range(int(first), int(last) + 1)]
    absent = [p for p in paths if not p.exists()]
    if absent or not paths:
        raise UserError(f"{path} means shards that do not exist: {absent[0] if absent else 'none'}", "Mend the range.")
    return paths
