"""Writes WebDataset shards, tar files of `<key>.jpg|png` and `<key>.cls`, each with the index that DALI reads.

Choice made: headers are packed here and every time stamp is zero, so the same data gives the same bytes; the index
costs nothing, because the writer knows each offset.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from fastssl.data.storage import writing
from fastssl.errors import UserError
from fastssl.runs.files import put_in_place, remove, temporary_name

INDEX_VERSION = "v1.2"  # of DALI's wds2idx
_BLOCK = 512
_END = b"\0" * (2 * _BLOCK)


class ShardWriter:
    """Writes samples into `<folder>/<name>-000000.tar`, `.idx` and so on; a context manager.

    The folder is made under a temporary name and takes its own, replacing an older one, on a clean exit only.

    Args:
        folder: to make or to replace.
        shard_bytes: a shard is closed before it would grow beyond this; a single larger sample gets its own.
        name: of the shards, before their number.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, name: str = "shard") -> None:
        self.folder, self._shard_bytes, self._name = Path(folder), shard_bytes, name
        self._temporary = temporary_name(self.folder, "tmp")
        self.count, self.shards = 0, 0
        self._file: IO[bytes] | None = None
        self._index: list[str] = []
        self._at = 0
        with writing(self.folder):
            self._temporary.mkdir()

    def extend(self, images: Sequence[np.ndarray | bytes], labels: Sequence[int]) -> None:
        """Append encoded images (never pixels), and their labels unless those are -1."""
        for data, label in zip(images, labels, strict=True):
            self._add(data, label)

    def _add(self, data: np.ndarray | bytes, label: int) -> None:
        assert isinstance(data, bytes)
        key = f"{self.count:09d}"
        members = [("jpg" if data[:2] == b"\xff\xd8" else "png", data)]
        if label >= 0:
            members.append(("cls", str(label).encode()))
        size = sum(_BLOCK + _padded(len(content)) for _, content in members)
        with writing(self.folder):
            if self._file is None or (self._index and self._at + size + len(_END) > self._shard_bytes):
                self._next()
            self._index.append(" ".join(self._member(key, suffix, content) for suffix, content in members))
        self.count += 1

    def _member(self, key: str, suffix: str, content: bytes) -> str:
        """Write one member; returns its entry in the index."""
        assert self._file is not None
        name = f"{key}.{suffix}"
        self._file.write(tar_header(name, len(content)))
        self._file.write(content)
        self._file.write(b"\0" * (_padded(len(content)) - len(content)))
        entry = f"{suffix} {self._at + _BLOCK} {len(content)} {name}"
        self._at += _BLOCK + _padded(len(content))
        return entry

    def _next(self) -> None:
        self._close()
        self._file = open(self._path(".tar"), "wb", buffering=1 << 20)  # noqa: SIM115
        self.shards += 1

    def _path(self, suffix: str) -> Path:
        return self._temporary / f"{self._name}-{self.shards:06d}{suffix}"

    def _close(self) -> None:
        """Finish the open shard and write its index."""
        if self._file is None:
            return
        self._file.write(_END)
        self._file.close()
        self._file = None
        index = Path(self._temporary / f"{self._name}-{self.shards - 1:06d}.idx")
        index.write_text("\n".join([f"{INDEX_VERSION} {len(self._index)}", *self._index]) + "\n")
        self._index, self._at = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.folder):
                    self._close()
                    check_replaceable(self.folder)
                    put_in_place(self._temporary, self.folder)
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk refuses the last bytes once more
                    self._file.close()
            remove(self._temporary)


def check_replaceable(target: Path) -> None:
    """UserError unless `target` is absent or a folder of nothing but .tar and .idx files."""
    if not target.exists():
        return
    if not target.is_dir() or any(p.suffix not in (".tar", ".idx") for p in target.iterdir()):
        raise UserError(f"{target} exists and is no folder of shards.", "Choose another target, or remove it.")


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of a regular file, mode 644, owner 0, time 0."""
    assert len(name) <= 100
    header = b"".join(
        (
            name.encode("ascii").ljust(100, b"\0"),
            b"0000644\x00" + 2 * b"0000000\x00",
            b"%011o\0" % size,
            b"00000000000\0",
            b" " * 8,
            b"0".ljust(101, b"\0"),
            b"ustar\x0000".ljust(_BLOCK - 257, b"\0"),
        )
    )
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
