"""Reads a tar archive from front to back, compressed or not, without ever unpacking it to disk.

Choice made: `tarfile` understands the headers (ustar, pax, GNU long names), the loop is here: `tarfile`'s own passes
over a damaged header in silence and keeps every member in memory. A conversion of 12,000 JPEGs of 32 x 32 pixels takes
1.4 times the CPU time that headers parsed by hand took (median of 14 pairs, 1.1 to 1.8).
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastssl.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_CHUNK = 1 << 20
_MAX_HEADER_BYTES = 1 << 16  # of a pax or long-name header
_BOMB_FROM_BYTES, _BOMB_RATIO = 1 << 30, 200  # image files hardly compress again; 200-fold is no data set
_EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_DAMAGE = (
    *(tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError),
    *(LookupError, RecursionError),  # of tarfile, at hostile headers
)
_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    b"BZh": bz2.open,
}


def read_tar(path: Path, *, max_bytes: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | Exception]]:
    """Yield (name, contents) of each regular file that is wanted, in the archive's order.

    Archives that were concatenated are read to the end of the last one.

    Args:
        path: .tar, or one compressed by gzip, xz or bzip2; recognized by its first bytes.
        max_bytes: larger members come as an exception and are passed over.
        wanted: whether to read the member of this name; the rest is skipped unread.

    Yields:
        The contents, or an exception whose sentence says why the member is refused: it lies outside of the
        archive's own folder (absolute or `..`), is a link, a device, sparse or too large.

    Raises:
        UserError: the archive is damaged, truncated (also between two members) or inflates beyond reason.
    """
    try:
        with open(path, "rb") as raw:
            opener = next((opener for magic, opener in _OPENERS.items() if raw.peek(6).startswith(magic)), None)
            file = _Bytes(raw if opener is None else io.BufferedReader(opener(raw), _CHUNK), raw)
            archive = _Archive(fileobj=file, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
            yield from _members(archive, file, max_bytes=max_bytes, wanted=wanted)
    except _DAMAGE as error:
        raise UserError(
            f"{path} cannot be read as a tar archive: {str(error).rstrip('.')}.", "Fetch or make the archive again."
        ) from error


class _Bytes:
    """The archive's bytes in order; an error where they inflate beyond reason."""

    def __init__(self, file: io.BufferedReader, raw: io.BufferedReader) -> None:
        self._file, self._raw, self._at = file, raw, 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer at the end."""
        data = self._file.read(size)
        self._at += len(data)
        if self._at > _BOMB_FROM_BYTES and self._at > _BOMB_RATIO * self._raw.tell():
            raise ValueError(f"{self._raw.tell()} bytes inflate to more than {self._at}")
        return data

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at


class _Archive(tarfile.TarFile):
    """What `TarInfo.fromtarfile` needs of an archive."""

    def next(self) -> None:
        """Nothing: the constructor would read the first member."""


class _Header(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile reads extension headers whole, whatever size they state
        if self.type in _EXTENSIONS and not 0 <= self.size <= _MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"an extension header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def _members(
    archive: tarfile.TarFile, file: _Bytes, *, max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes | Exception]]:
    is_ended = False  # by a block of zeros, without which whatever followed may be cut off
    while True:
        try:
            info = _Header.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # another archive may follow
            is_ended = True
            continue
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if not is_ended:
                raise ValueError("it ends without an end marker, as one that was cut off") from error
            return
        is_ended = False
        if info.size < 0:
            raise ValueError("a header states an impossible size")
        end = archive.offset
        contents = _contents(file, info, max_bytes=max_bytes, wanted=wanted)
        if contents is not None:
            yield info.name, contents
        while (left := end - file.tell()) > 0:
            if not file.read(min(left, _CHUNK)):
                raise ValueError("it ends in the middle of a member")


def _contents(
    file: _Bytes, info: tarfile.TarInfo, *, max_bytes: int, wanted: Callable[[str], bool]
) -> bytes | Exception | None:
    """A member's contents, why it is refused, or None where it is not wanted."""
    name = info.name
    kind = tarfile.GNUTYPE_SPARSE if info.issparse() else info.type
    if kind in _REFUSED:
        return ValueError(f"{name!r} is {_REFUSED[kind]}") if wanted(name) else None
    if not info.isreg() or name.endswith("/") or not (leaves(name) or wanted(name)):
        return None
    if leaves(name):
        return ValueError(f"{name!r} leaves the archive's folder")
    if info.size > max_bytes:
        return ValueError(f"{name!r} has {info.size} bytes, the limit is {max_bytes}")
    data = file.read(info.size)
    if len(data) < info.size:
        raise ValueError("it ends in the middle of a member")
    return data


def leaves(name: str) -> bool:
    """True when unpacking `name` would write outside of the target folder."""
    return name.startswith("/") or (".." in name and ".." in name.replace("\\", "/").split("/"))
