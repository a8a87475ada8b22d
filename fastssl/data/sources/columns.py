"""Columnar files: Parquet in the Hugging Face image layout, and data sets that `save_to_disk` left as Arrow files.

Batches of rows are read one after the other; a column of images is `struct<bytes, path>` or plain binary.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import MAX_ITEM_BYTES, Item, MissingSplitError, Stream, check_whole, split_of
from fastssl.data.sources.choices import Choices, choice
from fastssl.data.sources.guard import explained
from fastssl.data.sources.labels import read_label
from fastssl.errors import UserError, option

_ROWS = 64
LABEL_COLUMNS = (
    *("label", "labels", "fine_label", "class", "cls", "target", "category", "class_name", "label_name"),
    *("class_id", "label_id", "category_id"),
)
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")


class _Columns(NamedTuple):
    """Where a file's images and labels are; its class names, None where their numbers have none."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


Batches = Callable[[list[str]], Iterator[tuple[Path, Any]]]  # columns -> (file, pyarrow.RecordBatch)


def parquet_source(paths: list[Path], split: str, choices: Choices, *, name: str) -> Stream:
    """Rows of Parquet files, one after the other.

    Labels are integers (with Hugging Face's class names where the schema holds them) or names.

    Raises:
        UserError: when a file's columns or class names differ from the first one's.
    """
    parquet = _pyarrow("pyarrow.parquet")
    schemas, count = [], 0
    for path in paths:
        with explained(str(path)), parquet.ParquetFile(path) as file:
            schemas.append(file.schema_arrow)
            count += file.metadata.num_rows
    first = _columns_of_all(paths, schemas, split, choices, name=name)

    def batches(columns: list[str]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with explained(str(path)), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield path, batch

    return _stream(name, paths, schemas[0], first, count, batches)


def arrow_source(folder: Path, split: str, choices: Choices) -> Stream:
    """A data set, or a dictionary of data sets by split, as Hugging Face's `save_to_disk` wrote it."""
    arrow = _pyarrow("pyarrow")
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        wanted = next((word for word in splits if split_of(word) == split), None)
        if wanted is None:
            raise MissingSplitError(str(folder), split, splits)
        part = folder / wanted
    else:
        check_whole(folder, split)
        part = folder
    with explained(str(part)):
        state = json.loads((part / "state.json").read_text())
        paths = [part / entry["filename"] for entry in state["_data_files"]]
        schemas = [arrow.ipc.open_stream(arrow.memory_map(str(path))).schema for path in paths]
    first = _columns_of_all(paths, schemas, split, choices, name=str(folder))

    def batches(columns: list[str]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with explained(str(path)), arrow.memory_map(str(path)) as file:
                for batch in arrow.ipc.open_stream(file):
                    batch.validate(full=True)  # offsets of a damaged file would be read outside of its memory
                    for start in range(0, batch.num_rows, _ROWS):
                        yield path, batch.slice(start, _ROWS).select(columns)

    return _stream(str(folder), paths, schemas[0], first, None, batches)


def _columns(schema: Any, name: str, split: str, choices: Choices) -> _Columns:
    image = _image_column(schema, name, choices.image_column)
    label = _label_column(schema, name, choices.label_column) if split != "unlabeled" else None
    return _Columns(image, label, () if label is None else _class_names(schema, label))


def _columns_of_all(paths: list[Path], schemas: list[Any], split: str, choices: Choices, *, name: str) -> _Columns:
    """The first file's columns; UserError where another file's differ."""
    first = _columns(schemas[0], name, split, choices)
    for path, schema in zip(paths[1:], schemas[1:], strict=True):
        _check_same(path, _columns(schema, str(path), split, choices), paths[0], first)
    return first


def _check_same(path: Path, columns: _Columns, first_path: Path, first: _Columns) -> None:
    """UserError where the same row would mean something else in both files."""
    what = {"image": "image column", "label": "label column", "classes": "class names"}
    for field, own, other in zip(what, columns, first, strict=True):
        if own != other:
            shown, expected = (", ".join(x)[:80] if isinstance(x, tuple) else x for x in (own, other))
            raise UserError(
                f"{path} differs from {first_path.name} in its {what[field]}: {shown or 'none'} instead of "
                f"{expected or 'none'}.",
                "Give files of one data set, or convert each by itself.",
            )


def _stream(
    name: str, paths: list[Path], schema: Any, columns: _Columns, count: int | None, batches: Batches
) -> Stream:
    image, label, classes = columns
    if label is not None and _is_list(schema.field(label).type):  # of one value it is a label, of more it is none
        lists: list[Any] = next((batch.column(label).to_pylist() for _, batch in batches([label])), [])
        if any(len(values or ()) > 1 for values in lists):
            raise _no_labels(schema, name, label)
    account = Account(columns=tuple(schema.names), image_from=image, label_from=label)

    def items() -> Iterator[Item]:
        row = 0
        for path, batch in batches([image] if label is None else [image, label]):
            cells = batch.column(image).to_pylist()
            values = [None] * len(cells) if label is None else batch.column(label).to_pylist()
            for cell, value in zip(cells, values, strict=True):
                data = _bytes(cell, row)
                try:
                    number = read_label(value)
                except ValueError as error:
                    data, number = ValueError(f"row {row}: {error}"), -1
                yield Item(f"{path.name}[{row}]", data, number)
                row += 1

    return Stream(name, classes, count, items, account=account, files=lambda: paths)


def _bytes(cell: Any, row: int) -> bytes | Exception:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        return ValueError(f"row {row} holds no image bytes")
    if len(data) > MAX_ITEM_BYTES:
        return ValueError(f"row {row} has {len(data)} bytes, the limit is {MAX_ITEM_BYTES}")
    return data


def _image_column(schema: Any, name: str, given: str | None) -> str:
    """The column of images: the one that was given, else by a usual name, else the only one of bytes."""
    types = _pyarrow("pyarrow.types")

    def holds_bytes(kind: Any) -> bool:
        inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return bool(types.is_binary(inner) or types.is_large_binary(inner) or str(inner) == "binary_view")

    binary = [str(field.name) for field in schema if holds_bytes(field.type)]
    if not binary or (given is not None and given not in binary):
        shown = ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)
        raise UserError(
            f"{name} has no column {given!r} of image bytes, only {shown}."
            if given
            else f"{name} has no column of image bytes, only {shown}.",
            "Give a file with a column of struct<bytes, path> or of binary.",
        )
    usual = [column for column in IMAGE_COLUMNS if column in binary]
    if given is None and not usual and len(binary) > 1:
        raise UserError(
            f"{name} has several columns of bytes: {', '.join(binary)}.", f"Name one with {choice('image_column')}."
        )
    return given or (usual or binary)[0]


def _label_column(schema: Any, name: str, given: str | None) -> str | None:
    """The column that was given, else the first of a usual name; an error where its type can hold no labels."""
    column = given or next((known for known in LABEL_COLUMNS if known in schema.names), None)
    if column is None:
        return None
    if column not in schema.names:
        raise UserError(
            f"{name} has no column {column!r}.", f"Set {choice('label_column')} to one of: {', '.join(schema.names)}."
        )
    types, kind = _pyarrow("pyarrow.types"), schema.field(column).type
    inner = kind.value_type if types.is_dictionary(kind) or _is_list(kind) else kind
    tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null, types.is_string)
    if not any(test(inner) for test in (*tests, types.is_large_string)) and str(inner) != "string_view":
        raise _no_labels(schema, name, column)
    return column


def _is_list(kind: Any) -> bool:
    types = _pyarrow("pyarrow.types")
    return any(test(kind) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _no_labels(schema: Any, name: str, column: str) -> UserError:
    return UserError(
        f"{name}: the labels in column {column!r} are {str(schema.field(column).type)[:60]}, which are neither numbers "
        "nor names.",
        f"Name another with {choice('label_column')} (one of: {', '.join(schema.names)}), "
        f"or use {option('split', 'unlabeled')}.",
    )


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Names that Hugging Face's schema metadata gives to the label's numbers; None when it gives none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "Parquet and Arrow files need pyarrow, which is not installed.",
            "Install it with `pip install 'fastssl-vision[parquet]'`.",
        ) from error
