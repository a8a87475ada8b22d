"""Checkpoints: a folder of safetensors and one JSON, written aside, synced and renamed; nothing is ever unpickled.

`checkpoints/step-00001234/` holds weights.safetensors, optimizer.safetensors, state.json and, where weights are
averaged, average.safetensors. The JSON carries a sha256 of each file and of itself, so a damaged checkpoint is noticed
and the one before it is used.
"""

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from fastssl.errors import DamagedWarning, UserError, option
from fastssl.runs.files import atomic_path
from fastssl.runs.tensors import write_tensors

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
AVERAGE = "average.safetensors"
Kind = Literal["ema", "raw"]  # of weights: averaged over steps, or those of the last step


class Checkpoint(NamedTuple):
    """What one checkpoint holds.

    Attributes:
        weights: by name.
        optimizer: as `optimizer_snapshot` names them.
        state: JSON values.
        average: averaged weights by name, None without optim.ema.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    average: dict[str, Tensor] | None

    def chosen(self, which: Kind | None, place: Path) -> tuple[dict[str, Tensor], Kind]:
        """The weights asked for; the averaged ones, where there are any, when `which` is None.

        Raises:
            UserError: when the average is asked for and there is none, or neither is asked for.
        """
        if which not in (None, *get_args(Kind)):
            raise UserError(f"weights is {which!r}.", "Set it to ema or raw, or leave it out.")
        if which == "ema" and self.average is None:
            raise UserError(f"{place} holds no averaged weights.", "Set weights to raw, or train with optim.ema.")
        if which == "raw" or self.average is None:
            return self.weights, "raw"
        return self.average, "ema"


class DamagedError(Exception):
    """A checkpoint that is not whole; the message names the file and what is wrong with it."""


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers in host memory, contiguous."""
    return host_copies({name: tensor.detach() for name, tensor in module.state_dict().items()})


def optimizer_snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter's position>.<name>`; its numbers are the recipe's."""
    state = optimizer.state_dict()["state"]
    return host_copies(
        {f"{position}.{name}": value.detach() for position, values in state.items() for name, value in values.items()}
    )


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in host memory; those of CUDA go by way of pinned memory, and are waited for once."""
    copies = {}
    for name, tensor in tensors.items():
        pin = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        copies[name] = copy.copy_(tensor, non_blocking=pin)
    if any(tensor.device.type == "cuda" for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts `optimizer_snapshot`'s tensors back; groups and rates stay as the recipe built them."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        position, _, name = key.partition(".")
        state.setdefault(int(position), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                # fused kernels walk memory: a channels_last kernel's moments must lie as it does
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `folder/step-<step>`, complete or not at all.

    Args:
        folder: the run's checkpoint folder; made when absent.
        step: steps done.
        weights, optimizer: contiguous host tensors.
        average: averaged weights, likewise; None without them.
        state: JSON values that a resume needs.

    Raises:
        OSError: for example when the disk is full; earlier checkpoints stay as they are.
    """
    final = path_of(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(final) as temporary:
        temporary.mkdir()
        files = {WEIGHTS: weights, OPTIMIZER: optimizer} | ({} if average is None else {AVERAGE: average})
        sums = {name: write_tensors(temporary / name, tensors) for name, tensors in files.items()}
        record = {"format": FORMAT, "step": step, **state, "sha256": sums}
        record["self"] = digest(canonical(record))
        (temporary / STATE).write_bytes(json.dumps(record, indent=1).encode())
    return final


def read(path: Path) -> Checkpoint:
    """One checkpoint, after checking every byte.

    Raises:
        DamagedError: when anything is missing, cut short or changed.
        UserError: when a newer version wrote it.
    """
    try:
        record = json.loads((path / STATE).read_bytes())
        claimed = record.pop("self")
        if digest(canonical(record)) != claimed:
            raise DamagedError(f"{path / STATE} does not match its checksum")
        if record["format"] > FORMAT:  # whole, so not to be passed over for an older one
            raise UserError(
                f"{path} has checkpoint format {record['format']}; this version reads formats up to {FORMAT}.",
                "Upgrade fastssl-vision to the version that wrote it, or a later one.",
            )
        files = {}
        for name, expected in record["sha256"].items():
            files[name] = (path / Path(name).name).read_bytes()
            if digest(files[name]) != expected:
                raise DamagedError(f"{path / name} does not match its checksum")
        average = load_tensors(files[AVERAGE]) if AVERAGE in files else None
        return Checkpoint(load_tensors(files[WEIGHTS]), load_tensors(files[OPTIMIZER]), record, average)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__})") from error


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def steps_in(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def existing(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    numbered = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(numbered, key=steps_in, reverse=True)


def latest(folder: Path, *, warn: Any) -> Checkpoint | None:
    """The newest whole checkpoint, or None when there is none; `warn(sentence)` reports each damaged one."""
    for path in existing(folder):
        try:
            return read(path)
        except DamagedError as error:
            warn(f"{error}; trying the checkpoint before it.")
    return None


def set_aside(folder: Path, *, after: int) -> None:
    """Renames the checkpoints after a step, which a resume passed over as damaged, so that nothing counts them."""
    for path in existing(folder):
        if steps_in(path) > after:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, *, keep: int, protect: Path | None = None) -> None:
    """Removes all but the newest `keep` checkpoints and the protected one, and what killed runs left half-written."""
    for path in existing(folder)[keep:]:
        if path != protect:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def choose(path: Path, which: str | Path) -> Path:
    """What to read of a run: the run itself for "last", its best checkpoint, or the one named.

    Raises:
        UserError: when there is no such checkpoint.
    """
    folder = path / "checkpoints"
    if which == "last":
        return path
    if which == "best":
        return best_of(path, folder)
    named = folder / str(which) if (folder / str(which)).is_dir() else Path(str(which))
    names = ", ".join(checkpoint.name for checkpoint in existing(folder))
    fix = f"Choose last, best or one of {names}." if names else "Give the folder of a run that saved at least once."
    if not named.exists():
        raise UserError(f"There is no checkpoint {which}.", fix)
    places = (named.resolve(), named.parent.resolve() / named.name)  # a link may lie inside, or lead there
    if not any(folder.resolve() in place.parents for place in places):
        raise UserError(f"{named} is not a checkpoint of {path}.", fix)
    return named


def best_of(path: Path, folder: Path) -> Path:
    """The checkpoint of the highest accuracy on held-out images, as the newest whole one names it."""
    state = next((state for checkpoint in existing(folder) if (state := state_of(checkpoint))), {})
    step = (state.get("best") or {}).get("step")
    if step is None or not path_of(folder, step).is_dir():
        what = "no accuracy was measured while training" if step is None else f"that of step {step} is gone"
        raise UserError(f"{path} has no best checkpoint: {what}.", f"Use {option('checkpoint', 'last')}.")
    return path_of(folder, step)


def state_of(checkpoint: Path) -> dict[str, Any] | None:
    """The state of a checkpoint that is whole, else None."""
    try:
        return read(checkpoint).state
    except DamagedError:
        return None


def load_weights(path: Path, which: Kind | None = None) -> dict[str, Tensor]:
    """Weights from a run folder, a checkpoint folder or a .safetensors file, see `load_with_step`.

    Raises:
        UserError: when there are none or they are damaged.
    """
    return load_with_step(path, which)[0]


def load_with_step(path: Path, which: Kind | None = None) -> tuple[dict[str, Tensor], int | None, Kind | None]:
    """Weights with the step of their checkpoint and their kind, both None for a file outside of a run.

    A newer checkpoint that is damaged is passed over with a warning.

    Args:
        path: a run folder, a checkpoint folder or a .safetensors file.
        which: averaged or raw weights; the averaged ones, where there are any, when None.

    Raises:
        UserError: when there are none, or none of this kind, or they are damaged.
    """
    problems: list[str] = []
    if path.is_dir():
        inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if (inside / STATE).exists():
            with contextlib.suppress(DamagedError):
                whole = read(inside)
                weights, kind = whole.chosen(which, inside)
                return weights, int(whole.state["step"]), kind
            raise UserError(f"{inside} is damaged.", "Use another checkpoint of the run.")
        newest = latest(inside, warn=problems.append)
        if newest:
            step = int(newest.state["step"])
            weights, kind = newest.chosen(which, path)
            if problems:
                warnings.warn(f"{' '.join(problems)} Step {step} is used.", DamagedWarning, stacklevel=2)
            return weights, step, kind
        raise UserError(
            f"{path} holds no whole checkpoint{': ' + problems[0] if problems else ''}.",
            "Give the folder of a run that saved at least once.",
        )
    if which is not None and path.is_file():
        raise UserError(f"{path} holds one set of weights.", f"Leave {option('weights')} out, or give the run.")
    fix = "Give a run folder, a checkpoint folder or a .safetensors file."
    try:
        tensors: dict[str, Tensor] = load_tensors(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", fix) from error
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file.", fix) from error
    return tensors, None, None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()
