"""The files of a run directory but its checkpoints: recipe.yaml, data.json, environment.json and metrics.jsonl."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastssl.errors import UserError
from fastssl.recipe.load import dump, load
from fastssl.recipe.schema import Recipe
from fastssl.runs.environment import environment

Say = Callable[[str], None]


def check_run_dir(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses to mix two runs in one folder, and a folder that cannot be made.

    Raises:
        UserError: naming the keys that differ.
    """
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} is not a folder that can be written to.", "Choose another --run-dir.")
    written = folder / "recipe.yaml"
    if not written.exists():
        return
    if not resume:
        raise UserError(f"{folder} already holds a run.", "Add --resume to continue it, or choose another --run-dir.")
    same_recipe(load(written), recipe, str(folder))


def same_recipe(before: Recipe, now: Recipe, what: str) -> None:
    a, b = (recipe.model_dump(mode="json", exclude={"log"}) for recipe in (before, now))
    changed = different_keys(a, b)
    if changed:
        raise UserError(
            f"{what} was started with another recipe; {', '.join(changed)} differ.",
            "Resume with the recipe.yaml inside the run's folder, or choose another --run-dir.",
        )


def different_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix or "all"]
    keys = sorted({*a, *b})
    return [k for key in keys for k in different_keys(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]


def write_beginnings(folder: Path, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """The resolved recipe, the data's manifest, and the machine."""
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")


class Records:
    """metrics.jsonl: one line a record. Lines that a full disk refuses wait in memory and follow once it takes them.

    Args:
        path: of the file; None on ranks that do not write.
        say: is told once when lines begin to wait.
    """

    def __init__(self, path: Path | None, say: Say) -> None:
        self.path, self.say, self.waiting = path, say, b""

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            new = not self.waiting
            self.waiting += json.dumps(record).encode() + b"\n"
            problem = self.flush()
            if problem and new:
                self.say(f"{self.path.name} cannot be written ({problem}); its lines wait in memory. Free some space.")

    def flush(self) -> str:
        """Writes what waits; empty when all is on disk, else why not. Never leaves half a line."""
        if self.path is None or not self.waiting:
            return ""
        before = self.size()
        try:
            with open(self.path, "ab") as file:
                file.write(self.waiting)
        except OSError as error:
            self.cut(before)
            return str(error.strerror)
        self.waiting = b""
        return ""

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Back to the moment of a checkpoint."""
        if self.path is not None and self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(size)
