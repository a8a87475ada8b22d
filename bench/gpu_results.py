"""What bench/gpu_suite.py leaves behind, as one small archive: it travels, and another machine continues from it.

Figures, logs and the text of runs are in it. Images, checkpoints and caches are not: they are made again.
"""

import tarfile
from pathlib import Path

from fastssl.errors import UserError

SUFFIXES = {".json", ".jsonl", ".html", ".log", ".yaml", ".csv", ".svg", ".txt"}
ELSEWHERE = {"data", "checkpoints"}  # folders of which nothing travels: their text means nothing without the rest
LIMIT_BYTES = 16 << 20  # what a rented machine hands back as one file


def pack(folder: Path, archive: Path) -> str:
    """Write the results under `folder`, whole or not at all; return one line on size and what is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    results = [p for p in files if p.suffix in SUFFIXES and not ELSEWHERE & {*p.relative_to(folder).parts}]
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        for path in results:
            tar.add(path, path.relative_to(folder))
    part.replace(archive)
    size, rest = archive.stat().st_size, len(files) - len(results)
    warning = f", more than {LIMIT_BYTES / 2**20:.0f} MiB" if size > LIMIT_BYTES else ""
    return (
        f"{archive}: {len(results)} files, {size / 2**20:.2f} MiB{warning}; {rest} files of data and weights left out"
    )


def unpack(archive: Path, folder: Path) -> None:
    """Put the results of an earlier call where the next one looks for them.

    Raises:
        UserError: for what is no archive, or has anything but files and folders inside of it.
    """
    fix = "Give --results the archive that an earlier call wrote, or remove it."
    folder.mkdir(parents=True, exist_ok=True)
    inside, has_filter = folder.resolve(), hasattr(tarfile, "data_filter")  # since Python 3.11.4; Debian 12 has 3.11.2
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                place = (inside / member.name).resolve()
                if not (member.isfile() or member.isdir()) or not place.is_relative_to(inside):
                    raise UserError(f"{archive} holds {member.name}, which is no file inside of it.", fix)
            tar.extractall(folder, **({"filter": "data"} if has_filter else {}))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}.", fix) from error
