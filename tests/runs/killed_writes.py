"""`python killed_writes.py FOLDER`: replaces what each kind of writer wrote, killed after every call it makes.

For each call that touches the disk a child is forked, which writes and is killed by SIGKILL right after that call.
Old data never come under a new manifest or the reverse: class names would be those of other images.
Prints JSON for each kind: how many children were killed, and which files were then neither the old nor the new ones.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[Path, int], None]
CALLS = {"open", "close", "__exit__", "fsync", "replace", "rename", "unlink", "truncate"}


def run_files(folder: Path, version: int) -> None:
    from fastssl.recipe.load import load
    from fastssl.runs import directory

    directory.environment = lambda: {"version": version}  # type: ignore[assignment]  # asks git, which takes long
    recipe = load({"data": {"path": "x.beton"}, "seed": version, "train": {"epochs": 1}})
    directory.write_beginnings(folder, recipe, {"version": version})


def failure(folder: Path, version: int) -> None:
    from fastssl.runs.directory import write_failure

    write_failure(folder, ValueError(version))


def record(folder: Path, version: int) -> None:
    from fastssl.bench.record import save

    save(folder / "record.json", {"rows": [version]})


def sweep(folder: Path, version: int) -> None:
    from fastssl.training.sweep import write

    write(folder / "sweep.json", {"cells": [version]})


def features(folder: Path, version: int) -> None:
    import torch

    from fastssl.pretrained.evaluation.features import write

    write(folder / "features.safetensors", torch.full((5, 3), float(version)))


def embedding(folder: Path, version: int) -> None:
    from fastssl.data.sources import open_source
    from fastssl.pretrained.embedding.table import Table

    with Table(folder / "table.npy", open_source("shapes", count=4, side_px=8)) as table:
        table.add(np.full((4, 3), version, np.float32), list("abcd"), [version] * 4)
        table.finish()
        table.place({"version": version})


def checkpoint(folder: Path, version: int) -> None:
    import torch

    from fastssl.runs.checkpoint import save

    save(folder, step=1, weights={"w": torch.full((4,), float(version))}, optimizer={}, state={"version": version})


def beton(folder: Path, version: int) -> None:
    from fastssl.data.convert.convert import convert

    convert("shapes", folder / "x.beton", count=4 + version, side_px=8, workers=1)


def shards(folder: Path, version: int) -> None:
    from fastssl.data.convert.convert import convert

    convert("shapes", folder / "x", format="webdataset", count=4 + version, side_px=8, workers=1)


def schema(folder: Path, version: int) -> None:
    from fastssl.runs.files import atomic_json

    atomic_json(folder / "schema.json", {"version": version})


KINDS: dict[str, Write] = {
    write.__name__: write
    for write in (run_files, failure, record, sweep, features, embedding, checkpoint, beton, shards, schema)
}


def seen(folder: Path) -> dict[str, Any]:
    """Every name in a folder that is not hidden, with all that it holds."""
    return {
        path.name: {p.name: p.read_bytes() for p in sorted(path.iterdir())} if path.is_dir() else path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


def killed_after(number: int, write: Write, folder: Path) -> bool:
    """Whether a child that replaces version 0 by version 1 makes so many calls; it is killed after the last of them."""
    child = os.fork()
    if not child:
        calls = itertools.count(1)

        def count(frame: types.FrameType, event: str, function: Any) -> None:
            if event == "c_return" and function.__name__ in CALLS and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        write(folder, 1)
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def fits(name: str, now: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a file is the old or the new one. The manifest of a conversion is that of its data, or not there."""
    data = name.removesuffix(".json")
    if data == name or data not in old or Path(data).suffix not in ("", ".beton"):
        return now.get(name) in (old[name], new[name])
    return name not in now or {name: now[name], data: now.get(data)} in [
        {n: of[n] for n in (name, data)} for of in (old, new)
    ]


def torture(write: Write, folder: Path) -> dict[str, Any]:
    versions = []
    for version in (1, 0):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder, version)
        versions.append(seen(folder))
    new, old = versions
    wrong: list[str] = []
    for number in itertools.count(1):
        killed = killed_after(number, write, folder)
        now = seen(folder)
        wrong += [f"{name} at call {number}" for name in old if not fits(name, now, old, new)]
        if not killed:
            hidden = [p.name for p in folder.iterdir() if p.name.startswith(".")]
            return {"kills": number - 1, "wrong": wrong, "new": now == new, "changed": old != new, "hidden": hidden}
        write(folder, 0)
    raise AssertionError


if __name__ == "__main__":
    print(json.dumps({kind: torture(write, Path(sys.argv[1]) / kind) for kind, write in KINDS.items()}))
