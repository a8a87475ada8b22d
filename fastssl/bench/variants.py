"""One stage's variants, one after another: loaders, backends of the augmentation, and settings of the step.

Each variant is built, measured and freed before the next: together they need not fit in memory, and one that does not
fit loses its own row alone. Every function returns a benchmark record whose first row is the recipe as it stands.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from fastssl import build
from fastssl.augment.backend import backend_of
from fastssl.bench.parts import Parts, parts, work
from fastssl.bench.record import record, row
from fastssl.bench.timing import Step, side_by_side, waiter
from fastssl.data.loaders.choose import installed
from fastssl.errors import UserError, option
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.training.guards import torch_settings

LOADERS = {
    "resident": ["data.loader=resident", "data.memory=device"],
    "resident, host memory": ["data.loader=resident", "data.memory=host"],
    "resident, mapped file": ["data.loader=resident", "data.memory=mmap"],
    "ffcv": ["data.loader=ffcv"],
    "dali": ["data.loader=dali"],
}
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
BuildStep = Callable[[], Step]


def loader(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of every loader that is installed, alone: batches are made, nothing is done with them."""
    device, notes = build.hardware.device(recipe), list[str]()
    labels = build.data.labels_of(recipe.data.path)
    sets = build.data.sets(recipe, labels, build.data.labels_of(recipe.data.probe_path or recipe.data.path))

    def loading(name: str, changes: list[str]) -> Step:
        loader = build.data.loader(load(recipe, changes), recipe.data.path, sets.train, device=device)
        if name == "resident" and next(iter(loader.epoch(0))).offsets_B is not None:
            notes.append("resident: nothing is copied, a batch is places in the buffer of all images.")
        batches = (batch for epoch in cycle(range(1 << 20)) for batch in loader.epoch(epoch))
        return lambda: len(next(batches))

    steps: dict[str, BuildStep] = {}
    for name, changes in chosen(LOADERS, only).items():
        if name in PACKAGES and not installed(PACKAGES[name]):
            notes.append(f"{name} is not installed and left out.")
        elif name != "resident, host memory" or device.type != "cpu":  # on the CPU they are one
            steps[name] = partial(loading, name, changes)
    return measured("loader", recipe, steps, device=device, seconds=seconds, rounds=rounds, notes=notes)


def augment(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of every backend in bfloat16 and float32, on one batch of the recipe's images."""
    run = parts(load(recipe, ["train.compile=false", "augment.backend=torch"]))  # a batch that lies as any takes it
    batch, epoch = next(run.batches())
    fused = {"cpu": ["cpu"], "cuda": ["cuda"]}.get(run.device.type, [])
    steps: dict[str, BuildStep] = {}
    for backend in chosen(dict.fromkeys([*fused, "torch"]), only):
        for dtype in (run.augment.dtype, *({torch.bfloat16, torch.float32} - {run.augment.dtype})):
            variant = replace(run, augment=replace(run.augment, backend=backend_of(backend), dtype=dtype))  # type: ignore[arg-type]
            steps[f"{backend}, {str(dtype).removeprefix('torch.')}"] = partial(cutting, variant, batch, epoch)
    return measured("augment", recipe, steps, device=run.device, seconds=seconds, rounds=rounds, notes=[])


def cutting(run: Parts, batch: Any, epoch: int) -> Step:
    def step() -> int:
        run.views(batch, epoch)
        return len(batch)

    return step


def step(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of the step, fed views that stay in memory, with one setting changed at a time.

    "as trained" also loads and augments: its `time_against_fixed` row is what that costs (1 is nothing).
    """
    device, notes = build.hardware.device(recipe), list[str]()

    def build_step(name: str, changes: list[str]) -> Step:
        run = parts(load(recipe, changes))
        return training(run) if name == "as trained" else fixed(run)

    variants = chosen(settings(recipe, device), only)
    steps = {name: partial(build_step, name, changes) for name, changes in variants.items()}
    result = measured("step", recipe, steps, device=device, seconds=seconds, rounds=rounds, notes=notes)
    by_name = {entry["impl"]: entry["values"] for entry in result["rows"]}
    if {"fixed batch", "as trained"} <= by_name.keys():
        ratios = [fast / slow for fast, slow in zip(by_name["fixed batch"], by_name["as trained"], strict=True)]
        result["rows"].append(row("as trained", work(recipe, device), "time_against_fixed", ratios))
        result["notes"].append(f"Loading and augmentation make a step {sorted(ratios)[len(ratios) // 2]:.3f}x as long.")
    return result


def settings(recipe: Recipe, device: torch.device) -> dict[str, list[str]]:
    """Name to changes: the recipe fed a fixed batch and as trained, then each setting that matters turned over."""
    train = recipe.train
    other = "fp32" if build.hardware.precision(recipe) != "fp32" else "bf16"
    flipped = {"channels_last": not train.channels_last, "compile": not train.compile}
    changes = {
        f"{name}={str(value).lower()}": [f"train.{name}={str(value).lower()}"] for name, value in flipped.items()
    }
    if device.type == "cuda" and train.compile != "reduce-overhead":  # what it adds to compiling is CUDA graphs
        changes["compile=reduce-overhead"] = ["train.compile=reduce-overhead", "train.cuda_graph=false"]
    if device.type == "cuda" and not isinstance(train.compile, str):
        changes[f"cuda_graph={str(not train.cuda_graph).lower()}"] = [f"train.cuda_graph={not train.cuda_graph}"]
    return {"fixed batch": [], "as trained": [], f"precision={other}": [f"train.precision={other}"], **changes}


def fixed(run: Parts) -> Step:
    """Steps on one batch's views, cut beforehand."""
    batch, epoch = next(run.batches())
    groups = run.views(batch, epoch)

    def step() -> int:
        run.step(groups)
        return len(batch)

    return step


def training(run: Parts) -> Step:
    """Steps as the training loop takes them."""
    groups = run.trained_on()

    def step() -> int:
        run.step(next(groups))
        return run.batch_size

    return step


def measured(
    bench: str,
    recipe: Recipe,
    steps: Mapping[str, BuildStep],
    *,
    device: torch.device,
    seconds: float,
    rounds: int,
    notes: list[str],
) -> dict[str, Any]:
    """The record of all variants' images per second; one that does not run here is skipped with a note.

    Raises:
        UserError: naming why each is left out, when all are.
    """
    window_s, what, rows = seconds / max(1, len(steps)) / (rounds + 1), work(recipe, device), []
    with torch_settings(recipe):
        for name, build_step in steps.items():
            try:
                rates = side_by_side({name: build_step()}, wait=waiter(device), window_s=window_s, rounds=rounds)
            # a compiler that is absent, a precision that the device lacks, too little memory
            except (RuntimeError, MemoryError, UserError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
                notes.append(f"{name} does not run here and is left out: {reason}")
                if isinstance(error, UserError) and len(steps) == 1:
                    raise
            else:
                rows.append(row(name, what, "images_per_s", rates[name]))
            free(device)
    if not rows:
        raise UserError(
            f"No variant runs here: {'; '.join(notes).rstrip('.')}.", f"Choose others with {option('only')}."
        )
    return record(
        bench,
        rows,
        recipe.model_dump(mode="json"),
        data_digest=build.data.manifest_of(recipe.data.path).digest,
        warmup=f"a step and {window_s:.2f} s of each untimed, one variant after another",
        notes=notes,
    )


def free(device: torch.device) -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen(variants: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    """Those whose name contains one of `only`, or all.

    Raises:
        UserError: when there is none.
    """
    selected = {name: what for name, what in variants.items() if not only or any(word in name for word in only)}
    if not selected:
        raise UserError(
            f"No variant's name has {' or '.join(only or ())} in it.", f"Choose from: {', '.join(variants)}."
        )
    return selected
