"""A run's directory but for its checkpoints: who may write there, what it begins with, its metrics, what ended it.

recipe.yaml, data.json and environment.json are written when the run begins, metrics.jsonl grows, and failure.json
says what ended a run that failed; a new start takes that away. `.lock` is locked while a process trains.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastssl.errors import Interrupted, UserError, option
from fastssl.recipe.load import dump, load
from fastssl.recipe.schema import Recipe
from fastssl.runs.environment import environment
from fastssl.runs.files import atomic_json, atomic_write, json_text, sync

OnWarning = Callable[[str], None]
FAILURE = "failure.json"
DUPLICATES = "duplicates.json"  # what `fastssl duplicates` keeps of a run
LOCK = ".lock"
DATA_FILES = ("path", "probe_path", "test_path")  # of a recipe's `data`
JUDGED_ANYHOW = {"batch_size", "baselines"}  # of a recipe's `evaluate`: they change nothing in training
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that cannot lock
START_WAIT_S = 2.0  # `is_locked` of another process holds a lock for an instant


def check_run_dir(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses to mix two runs in one folder, and a folder that cannot be made.

    Raises:
        UserError: naming the keys that differ.
    """
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} is not a folder that can be written to.", f"Choose another {option('run_dir')}.")
    written = folder / "recipe.yaml"
    has_checkpoints = any((folder / "checkpoints").glob("step-*"))  # which carry a recipe, too
    if not resume and (written.exists() or has_checkpoints):
        raise UserError(
            f"{folder} already holds a run.",
            f"Add {option('resume', True)} to continue it, or choose another {option('run_dir')}.",
        )
    if written.exists():
        same_recipe(load(written), recipe, str(folder))


def same_recipe(before: Recipe, now: Recipe, what: str) -> None:
    changed = different_keys(comparable(before), comparable(now))
    if changed == ["train.epochs"]:
        check_extension(before, now, what)
    elif changed:
        raise UserError(
            f"{what} was started with another recipe; {', '.join(changed)} differ.",
            f"Resume with the recipe.yaml inside the run's folder, or choose another {option('run_dir')}.",
        )


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What may not change: of data files whether there is one, since they may move and their digests tell them."""
    tree = recipe.model_dump(mode="json", exclude={"log": True, "train": {"threads"}, "evaluate": JUDGED_ANYHOW})
    return tree | {"data": tree["data"] | {field: tree["data"][field] is not None for field in DATA_FILES}}


def check_extension(before: Recipe, now: Recipe, what: str) -> None:
    """Refuses more epochs where what happened in the earlier ones depends on their number.

    Raises:
        UserError: saying how to continue from the weights.
    """
    first, wanted = before.train.epochs, now.train.epochs
    constant = now.optim.schedule == "constant"
    schedule = "the growth of its views" if constant else f"its {now.optim.schedule} schedule"
    fixed = not constant or now.augment.progressive is not None
    if wanted > first and not fixed:
        return
    why = f"{schedule} ends with epoch {first}" if wanted > first else f"it has {first}"
    raise UserError(
        f"{what} was started with another recipe; train.epochs differ ({wanted} asked for, and {why}).",
        f"Train on from its weights as a new run: model.weights=RUN with another {option('run_dir')}; only a run with "
        "optim.schedule constant can be given more epochs.",
    )


def different_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix or "all"]
    keys = sorted({*a, *b})
    return [k for key in keys for k in different_keys(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]


def write_beginnings(
    folder: Path,
    recipe: Recipe,
    manifest: dict[str, Any],
    *,
    weights: dict[str, Any] | None = None,
    trains: bool = True,
) -> None:
    """The resolved recipe, the data's manifest, the machine that trains, and what of a file of weights it took."""
    atomic_write(folder / "recipe.yaml", dump(recipe))
    atomic_json(folder / "data.json", manifest)
    if trains:
        atomic_json(folder / "environment.json", environment())
    if weights is not None:
        atomic_json(folder / "weights.json", weights)


@contextlib.contextmanager
def lock(run_dir: Path, *, on_warning: OnWarning) -> Iterator[None]:
    """Keep two processes from training in one folder; the system drops the lock when the process dies.

    Args:
        run_dir: an existing folder.
        on_warning: called with one sentence where the file system has no locks; then nothing is kept out.

    Raises:
        UserError: when another process holds the lock.
    """
    held = FileLock(run_dir / LOCK, timeout=START_WAIT_S, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout as error:
        raise UserError(
            f"Another process is training in {run_dir}.", f"Wait for it, or choose another {option('run_dir')}."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        on_warning(f"The file system of {run_dir} has no locks: make sure that no other process trains in this folder.")
    try:
        yield
    finally:
        held.release()


def is_locked(run_dir: Path) -> bool:
    """Whether a process is training there, as far as the file system and its permissions let one see."""
    if not (run_dir / LOCK).exists():
        return False
    try:
        with FileLock(run_dir / LOCK, timeout=0.02, poll_interval=0.01, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def record_failure(folder: Path | None) -> Iterator[None]:
    """Leave failure.json in a run's folder when an error ends the block; the block begins where the run does.

    A signal (`Interrupted`, `KeyboardInterrupt`) is no failure: such a run is whole and can be resumed.

    Args:
        folder: the run's; None on ranks that do not write.
    """
    if folder is None:
        yield
        return
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            write_failure(folder, error)
        raise


def write_failure(folder: Path, error: Exception) -> None:
    """failure.json: {"what", "fix"}, the latter empty unless a person can fix it."""
    what, fix = (error.what, error.fix) if isinstance(error, UserError) else (f"{type(error).__name__}: {error}", "")
    atomic_json(folder / FAILURE, {"what": what, "fix": fix})


class Records:
    """metrics.jsonl: one line per record. Lines that a full disk refuses wait in memory until it takes them.

    Args:
        path: of the file; None on ranks that do not write.
        on_warning: called with one sentence when lines begin to wait.
    """

    def __init__(self, path: Path | None, on_warning: OnWarning) -> None:
        self.path, self.on_warning, self.waiting = path, on_warning, b""

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            new = not self.waiting
            self.waiting += json_text(record).encode() + b"\n"
            problem = self.flush()
            if problem and new:
                self.on_warning(
                    f"{self.path.name} cannot be written ({problem}); its lines wait in memory. Free some space."
                )

    def flush(self) -> str:
        """Write what waits; empty when all is written, else why not. Never leaves half a line."""
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

    def sync(self) -> str:
        """As `flush`, and wait for the disk: a checkpoint must not count lines that a loss of power can take."""
        problem = self.flush()
        if problem or self.path is None or not self.path.exists():
            return problem
        try:
            sync(self.path)
        except OSError as error:
            return str(error.strerror)
        return ""

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cut_to_lines(self) -> None:
        """Without what follows the last whole line."""
        if self.path is not None and self.path.exists():
            self.cut(self.path.read_bytes().rfind(b"\n") + 1)

    def cut(self, size: int) -> None:
        """Back to the moment of a checkpoint."""
        if self.path is not None and self.size() > size:
            with open(self.path, "r+b") as file:
                file.truncate(size)
