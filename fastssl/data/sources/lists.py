"""Images named one a line in a .csv or .tsv file."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.sources.base import SPLITS, Indexed, Item, missing_split, no_labels, numbered
from fastssl.data.sources.folders import read_file
from fastssl.errors import UserError

_PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image")
_LABEL_NAMES = ("label", "class", "category", "target")


def csv_source(path: Path, split: str) -> Indexed:
    """Image files by path and label, comma or tab separated, with a header or without.

    Paths are relative to the file's folder. The label is a name, or a number throughout; a column `split`, if there
    is one, chooses the rows.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",") if row]
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "Give a comma separated file of paths and labels."
        ) from error
    columns, rows = _columns(rows)
    if "split" in columns:
        found = {row[columns["split"]].lower() for row in rows}
        rows = [row for row in rows if row[columns["split"]].lower() in SPLITS[split]]
        if not rows:
            raise missing_split(str(path), split, found)
    if not rows:
        raise UserError(f"{path} names no images", "Give lines of path,label.")
    wide = max(columns.values())
    short = next((row for row in rows if len(row) <= wide), None)
    if short is not None:
        raise UserError(f"{path} has a line of {len(short)} fields: {','.join(short)!r}", f"Give {wide + 1} in each.")
    names = [row[columns["path"]] for row in rows]
    words = [row[columns["label"]] for row in rows] if "label" in columns and split != "unlabeled" else []
    classes, labels_N = _labels(words, len(names))

    def read(index: int) -> Item:
        return Item(names[index], read_file(path.parent / names[index]), int(labels_N[index]))

    return Indexed(str(path), classes, labels_N, read)


def _columns(rows: list[list[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """Positions of path, label and split, and the rows without their header."""
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    path = next((head.index(name) for name in _PATH_NAMES if name in head), None)
    if path is None:
        return ({"path": 0, "label": 1} if len(head) > 1 else {"path": 0}), rows
    columns = {"path": path}
    label = next((head.index(name) for name in _LABEL_NAMES if name in head), None)
    if label is not None:
        columns["label"] = label
    if "split" in head:
        columns["split"] = head.index("split")
    return columns, rows[1:]


def _labels(words: list[str], count: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    if not words:
        return (), no_labels(count)
    if all(word.strip().isdecimal() for word in words):
        labels_N = np.array([int(word) for word in words], np.int64)
        return numbered(labels_N), labels_N
    classes = tuple(sorted(set(words)))
    index = {name: i for i, name in enumerate(classes)}
    return classes, np.array([index[word] for word in words], np.int64)
