"""Images named one per line in a .csv or .tsv file."""

import codecs
import contextlib
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import (
    IMAGE_SUFFIXES,
    Indexed,
    Item,
    MissingSplitError,
    check_whole,
    is_image_name,
    no_labels,
    split_of,
)
from fastssl.data.sources.choices import Choices, choice
from fastssl.data.sources.folders import read_file
from fastssl.data.sources.labels import number_labels, read_labels
from fastssl.errors import UserError

IMAGE_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "img_path"),
    *("image_name", "image_id", "id", "name"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "cls", "category", "target", "class_name", "category_name", "label_name"),
    *("class_id", "category_id", "label_id"),
)
_SEPARATORS = ",;\t|"
_SHOWN = 5


def csv_source(path: Path, split: str, choices: Choices) -> Indexed:
    """Image files by path and label, with a header or without; separated by commas, semicolons, tabs or bars.

    Paths are relative to the file's folder, or to `choices.image_root`; an id without a suffix is looked for with each
    suffix of an image. A column `split`, if there is one, chooses the rows.
    """
    account = Account()
    numbered = _read(path)
    head, rows = _header(path, [row for _, row in numbered], choices)
    lines = [line for line, _ in numbered][-len(rows) :]
    image = _column(path, head, choices.image_column, IMAGE_COLUMNS, "image") if head else 0
    label = _column(path, head, choices.label_column, LABEL_COLUMNS, "label") if head else 1
    if not head and any(len(row) < 2 for row in rows):
        label = None
    assert image is not None
    _check_rows(path, numbered[0][1], rows, lines, {image, label or 0})
    rows, other_rows = _of_split(path, head, rows, split, account)
    names = [row[image].strip() for row in rows]
    account.columns = tuple(head)
    account.image_from = head[image] if head else "first column"
    words: list[str] = []
    if label is not None and split != "unlabeled":
        account.label_from = head[label] if head else "second column"
        words = [row[label] for row in rows]
    labels, bad = read_labels(words)
    if bad:
        shown = "; ".join(f"{names[i]}: {reason}" for i, reason in bad[:_SHOWN])
        raise UserError(f"{path} has {len(bad)} labels that cannot be used: {shown}.", "Fix them, or leave them empty.")
    others = read_labels(row[label] for row in other_rows)[0] if label is not None else ()
    classes, labels_N = number_labels(labels, others) if words else ((), no_labels(len(names)))
    find = _finder(choices.image_root or path.parent)

    def read(index: int) -> Item:
        file = find(names[index])
        data = file if isinstance(file, Exception) else read_file(file)
        return Item(names[index], data, int(labels_N[index]))

    def files() -> Iterator[Path]:
        yield path
        for name in names:
            with contextlib.suppress(OSError):  # such as of a name that is too long
                if isinstance(file := find(name), Path):
                    yield file

    return Indexed(str(path), classes, labels_N, read, account, files)


def _read(path: Path) -> list[tuple[int, list[str]]]:
    """All rows that are not empty, each with its line; the separator is the one that cuts the first into most fields.

    Raises:
        UserError: for an unclosed quote, which would make one field of all lines that follow.
    """
    with open(path, "rb") as start:
        wide = start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with open(path, newline="", encoding="utf-16" if wide else "utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in file if line.strip()), "")
        counts = {sep: len(next(csv.reader([first], delimiter=sep), [])) for sep in _SEPARATORS}
        separator = "\t" if path.suffix.lower() == ".tsv" else max(_SEPARATORS, key=lambda sep: counts[sep])
        file.seek(0)
        reader, rows, line = csv.reader(file, delimiter=separator, strict=True), [], 1
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: {error}.", "Close each quote, and write a quote within a quoted field twice."
            ) from error
    if not rows:
        raise UserError(f"{path} names no images.", "Give a comma separated file of paths and labels.")
    return rows


def _header(path: Path, rows: list[list[str]], choices: Choices) -> tuple[list[str], list[list[str]]]:
    """Column names, [] where there is no header, and the other rows.

    A first line is a header if it holds a known name; it is a row if its first cell names a file.
    """
    head = [cell.strip() for cell in rows[0]]
    given = {choices.image_column, choices.label_column} - {None}
    if given & set(head) or any(cell.lower() in IMAGE_COLUMNS for cell in head):
        if len(rows) < 2:
            raise UserError(f"{path} names no images.", "Give lines below its header.")
        return head, rows[1:]
    root = choices.image_root or path.parent
    try:
        is_file = is_image_name(head[0]) or (root / head[0]).is_file()
    except (OSError, ValueError):
        is_file = False
    if given or not is_file:
        raise UserError(
            f"{path}: the first line ({', '.join(head)[:80]}) holds no column that names images, and its first field "
            "is no image file.",
            f"Name the column with {choice('image_column')}, or call it one of: {', '.join(IMAGE_COLUMNS)}.",
        )
    return [], rows


def _check_rows(path: Path, first: list[str], rows: list[list[str]], lines: list[int], used: set[int]) -> None:
    """UserError where a field was cut by a separator within it, or holds a line break; naming the first such line.

    Args:
        first: the header, or the first row where there is none.
        lines: where each row begins.
        used: positions of the columns that are read.
    """
    short = [row for row in rows if len(row) <= max(used)]
    if short:
        raise UserError(
            f"{path} has {len(short)} lines of too few fields, such as {','.join(short[0])[:80]!r}.",
            f"Give {max(used) + 1} in each.",
        )
    width = max(max(used) + 1, 0 if first is rows[0] else _width(first))  # without a header: path and label
    for line, row in zip(lines, rows, strict=True):
        if _width(row) > width:
            raise UserError(
                f"{path}, line {line} has {_width(row)} fields instead of {width}: {','.join(row)[:80]!r}.",
                "Put a field that holds the separator in quotes; name the columns in a header line if there are more.",
            )
        if any(re.search(r"[\r\n]", row[position].strip()) for position in used):
            raise UserError(f"{path}, line {line}: a field holds a line break.", "Close the quote that opens there.")


def _width(row: list[str]) -> int:
    """Number of fields, without empty ones at the end."""
    return max((i + 1 for i, cell in enumerate(row) if cell.strip()), default=0)


def _column(path: Path, head: Sequence[str], given: str | None, known: Sequence[str], what: str) -> int | None:
    """Position of the column that a person gave, else of the first known name; None where there is no such label."""
    if given is not None:
        if given not in head:
            raise UserError(
                f"{path} has no column {given!r}.", f"Set {choice(f'{what}_column')} to one of: {', '.join(head)}."
            )
        return head.index(given)
    lower = [cell.lower() for cell in head]
    position = next((lower.index(name) for name in known if name in lower), None)
    if position is None and what == "image":
        raise UserError(
            f"{path} has no column of images.", f"Set {choice('image_column')} to one of: {', '.join(head)}."
        )
    return position


def _of_split(
    path: Path, head: list[str], rows: list[list[str]], split: str, account: Account
) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of one split and the others, where a column names it; otherwise all, see `check_whole`."""
    position = next((i for i, name in enumerate(head) if name.lower() in ("split", "subset", "partition")), None)
    if position is None:
        check_whole(path, split)
        return rows, []
    words = [row[position].strip() if len(row) > position else "" for row in rows]
    account.splits.update(words)
    chosen = [row for row, word in zip(rows, words, strict=True) if split_of(word) == split]
    others = [row for row, word in zip(rows, words, strict=True) if split_of(word) != split]
    if not chosen:
        raise MissingSplitError(str(path), split, set(words))
    return chosen, others


def _finder(root: Path) -> Callable[[str], Path | Exception]:
    """The file of a name; of an id without suffix, where one image has it. It may be absent."""
    listings: dict[Path, dict[str, list[str]]] = {}

    def listing(folder: Path) -> dict[str, list[str]]:
        if folder not in listings:
            stems: dict[str, list[str]] = {}
            for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
                if entry.suffix.lower() in IMAGE_SUFFIXES:
                    stems.setdefault(entry.stem, []).append(entry.name)
            listings[folder] = stems
        return listings[folder]

    def find(name: str) -> Path | Exception:
        if "\0" in name:
            return ValueError(f"{name!r} is no file's name")
        path = root / name.replace("\\", "/") if not (root / name).exists() else root / name
        if path.is_file() or is_image_name(name):
            return path
        same = listing(path.parent).get(path.name, [])
        if len(same) > 1:
            return ValueError(f"{name!r} may be any of {', '.join(same)}")
        return path.parent / same[0] if same else path

    return find
