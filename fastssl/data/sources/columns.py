"""Columnar files: Parquet in the Hugging Face image layout, and data sets that `save_to_disk` left as Arrow files.

Batches of rows are read one after the other; a column of images is `struct<bytes, path>` or plain binary.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastssl.data.sources.base import MAX_ITEM_BYTES, SPLITS, Item, Stream, missing_split
from fastssl.errors import UserError

_ROWS = 64
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category")
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")

Batches = Callable[[list[str]], Iterator[tuple[Path, Any]]]  # columns -> (file, pyarrow.RecordBatch)


def parquet_source(paths: list[Path], split: str, *, name: str) -> Stream:
    """Rows of Parquet files, one after the other.

    Labels are integers (with Hugging Face's class names where the schema holds them) or names.
    """
    parquet = _pyarrow("pyarrow.parquet")
    with _reading(paths[0]):
        schema = parquet.read_schema(paths[0])
        count = sum(parquet.read_metadata(path).num_rows for path in paths)

    def batches(columns: list[str]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with _reading(path), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield path, batch

    return _stream(name, schema, count, batches, split)


def arrow_source(folder: Path, split: str) -> Stream:
    """A data set, or a dictionary of data sets by split, as Hugging Face's `save_to_disk` wrote it."""
    arrow = _pyarrow("pyarrow")
    if (folder / "dataset_dict.json").exists():
        found = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        wanted = next((word for word in found if word.lower() in SPLITS[split]), None)
        if wanted is None:
            raise missing_split(str(folder), split, found)
        part = folder / wanted
    else:
        part = folder
    with _reading(part):
        state = json.loads((part / "state.json").read_text())
        paths = [part / entry["filename"] for entry in state["_data_files"]]
        schema = arrow.ipc.open_stream(arrow.memory_map(str(paths[0]))).schema

    def batches(columns: list[str]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with _reading(path), arrow.memory_map(str(path)) as file:
                for batch in arrow.ipc.open_stream(file):
                    for start in range(0, batch.num_rows, _ROWS):
                        yield path, batch.slice(start, _ROWS).select(columns)

    return _stream(str(folder), schema, None, batches, split)


def _stream(name: str, schema: Any, count: int | None, batches: Batches, split: str) -> Stream:
    image, label = _image_column(schema, name), _label_column(schema)
    if split == "unlabeled":
        label = None
    directories: set[str] = set()

    def items() -> Iterator[Item]:
        row = 0
        for path, batch in batches([image] if label is None else [image, label]):
            cells = batch.column(image).to_pylist()
            labels = [-1] * len(cells) if label is None else batch.column(label).to_pylist()
            for cell, value in zip(cells, labels, strict=True):
                found = -1 if value is None else value
                if isinstance(found, str):
                    directories.add(found)
                yield Item(f"{path.name}[{row}]", _bytes(cell, row), found if isinstance(found, str) else int(found))
                row += 1

    classes = () if label is None else _class_names(schema, label)
    return Stream(name, classes, count, items, directories)


def _bytes(cell: Any, row: int) -> bytes | Exception:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        return ValueError(f"row {row} holds no image bytes")
    if len(data) > MAX_ITEM_BYTES:
        return ValueError(f"row {row} has {len(data)} bytes, the limit is {MAX_ITEM_BYTES}")
    return data


def _image_column(schema: Any, name: str) -> str:
    """The column of images: by a usual name, else the only one of bytes."""
    types = _pyarrow("pyarrow.types")

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def holds_bytes(kind: Any) -> bool:
        inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return is_binary(inner)

    found = [field.name for field in schema if holds_bytes(field.type)]
    found.sort(key=lambda column: column not in _IMAGE_NAMES)
    if not found:
        raise UserError(
            f"{name} has no column of image bytes, only {', '.join(schema.names)}",
            "Give a file with a column of struct<bytes, path> or of binary.",
        )
    return str(found[0])


def _label_column(schema: Any) -> str | None:
    types = _pyarrow("pyarrow.types")
    usable = [f.name for f in schema if types.is_integer(f.type) or types.is_string(f.type)]
    return next((name for name in _LABEL_NAMES if name in usable), None)


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
            "Parquet and Arrow files need pyarrow, which is not installed",
            "Install it with: pip install 'fastssl-vision[parquet]'.",
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What pyarrow and json raise for damaged files, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # ArrowInvalid is a ValueError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}", "Fetch or make it again.") from error
