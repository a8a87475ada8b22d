"""The table of features and names that `embed` writes: hidden files that grow, and get their names when all is whole.

N images, F features, B images of a batch.
"""

import contextlib
import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastssl.data.convert.labels import Numbering
from fastssl.data.manifest import manifest_path
from fastssl.data.sources import Source
from fastssl.data.storage import writing
from fastssl.errors import UserError, option
from fastssl.runs.files import put_in_place, remove, remove_abandoned, temporary_name

ROW_GROUP = 4096


class Table:
    """The output while it grows: features and names in two hidden files, which are gone unless `place` is called.

    Attributes:
        count, skipped: images stored, and images that could not be read.
    """

    def __init__(self, out: Path, source: Source) -> None:
        self.out, self.source, self.count, self.skipped = out, source, 0, 0
        self.numbering = Numbering(source)
        self.features_path, self.names_path = temporary_name(out, "npy"), temporary_name(out, "names")
        self.done: list[tuple[Path, Path]] = []  # finished files under their hidden names, and the names they will have
        self.files = contextlib.ExitStack()
        self.features_dim: int | None = None

    def __enter__(self) -> "Table":
        with writing(self.out):
            remove_abandoned(self.out)
            self.features: IO[bytes] = self.files.enter_context(open(self.features_path, "w+b"))
            self.names: IO[str] = self.files.enter_context(open(self.names_path, "w", encoding="utf-8"))
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.close()
        for path in (self.features_path, self.names_path, *(hidden for hidden, _ in self.done)):
            remove(path)

    def add(self, h_BF: NDArray[np.float32], keys: Sequence[str], labels: Sequence[int | str]) -> None:
        with writing(self.out):
            if self.features_dim is None:
                self.features_dim = h_BF.shape[1]
                self.write_header()
            self.features.write(np.ascontiguousarray(h_BF, np.float32).tobytes())
            self.names.writelines(json.dumps(key) + "\n" for key in keys)
        self.count += len(h_BF)
        self.numbering.number(labels)

    def write_header(self) -> None:
        """numpy leaves room in the header for the number of rows to grow, so it can be written again at the end."""
        description = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.features_dim)}
        self.features.seek(0)
        np.lib.format.write_array_header_1_0(self.features, description)

    def finish(self) -> dict[str, Any]:
        """Completes all files but for their names; returns what they hold."""
        if not self.count:
            raise UserError(f"{self.source.name}: no image could be read.", "See whether it holds images at all.")
        classes, labels_N = self.numbering.finish()
        with writing(self.out):
            self.write_header()
            self.files.close()
            if self.out.suffix == ".npy":
                table = self.hidden(self.out.with_suffix(".csv"))
                write_csv(table, self.rows(classes, labels_N))
                self.done.append((self.features_path, self.out))
            else:
                features_NF = np.load(self.features_path, mmap_mode="r")
                write_parquet(self.hidden(self.out), features_NF, self.rows(classes, labels_N))
        return {
            "files": [str(path) for _, path in self.done],
            "count": self.count,
            "features_dim": self.features_dim,
            "classes": list(classes),
            "labeled": int((labels_N >= 0).sum()),
            "skipped": self.skipped,
            "account": self.source.account.to_json(),
        }

    def hidden(self, path: Path) -> Path:
        remove_abandoned(path)
        self.done.append((temporary_name(path, "part"), path))
        return self.done[-1][0]

    def rows(self, classes: Sequence[str], labels_N: NDArray[np.int64]) -> Iterator[tuple[str, int, str]]:
        """(id, label, class) of every image; label -1 and class "" where there is none."""
        with open(self.names_path, encoding="utf-8") as names:
            for name, label in zip(names, labels_N.tolist(), strict=True):
                yield json.loads(name), label, classes[label] if label >= 0 else ""

    def place(self, record: dict[str, Any]) -> None:
        """Gives every file its name, replacing earlier ones, and writes the record next to them."""
        with writing(self.out):
            self.hidden(manifest_path(self.out)).write_text(json.dumps(record, indent=1), encoding="utf-8")
            for hidden, path in self.done:
                put_in_place(hidden, path)


def check_replaceable(out: Path, source: str | Path) -> None:
    """UserError where a file to be written is the source, or stands next to `out` and is of somebody else."""
    fix = f"Give {option('out')} another name, such as features{out.suffix}."
    record, table = manifest_path(out), out.with_suffix(".csv")
    files = [out, record, *([table] if out.suffix == ".npy" else [])]
    for path in files:
        check_no_source(path, source, fix=fix)
    own = names_of_record(record)
    for path in files[1:]:
        if path.exists() and (own is None or path.name not in {record.name, *own}):
            raise UserError(f"{path} exists already, and was not written with {out}.", fix)


def check_no_source(path: Path, source: str | Path, *, fix: str) -> None:
    """UserError where a file to be written is the source."""
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise UserError(f"{path} is the source, and would be replaced by what is written.", fix)


def names_of_record(path: Path) -> set[str] | None:
    """Names of the files that a record of `embed` says were written with it; None where it is no such record."""
    try:
        return {Path(name).name for name in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_csv(path: Path, rows: Iterator[tuple[str, int, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label", "class"))
        writer.writerows(rows)


def write_parquet(path: Path, features_NF: NDArray[np.float32], rows: Iterator[tuple[str, int, str]]) -> None:
    """Columns id, label, class and features (a list of F float32), ROW_GROUP images at a time."""
    pa, parquet = pyarrow(), importlib.import_module("pyarrow.parquet")
    width = features_NF.shape[1]
    kinds = {"id": pa.string(), "label": pa.int64(), "class": pa.string(), "features": pa.list_(pa.float32(), width)}
    schema = pa.schema(list(kinds.items()))
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(features_NF), ROW_GROUP):
            part_BF = np.asarray(features_NF[first : first + ROW_GROUP])
            ids, labels, names = zip(*(next(rows) for _ in range(len(part_BF))), strict=True)
            values = pa.FixedSizeListArray.from_arrays(pa.array(part_BF.reshape(-1)), width)
            columns = [list(map(escaped, ids)), labels, list(map(escaped, names)), values]
            writer.write_table(pa.table(columns, schema=schema))


def escaped(name: str) -> str:
    """For Parquet, whose text is UTF-8: a byte of a name that is not, such as latin-1's, as `\\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            "Writing .parquet needs pyarrow, which is not installed.",
            "Install it with `pip install 'fastssl-vision[parquet]'`, or write .npy.",
        ) from error
