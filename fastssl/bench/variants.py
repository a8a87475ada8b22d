"""One stage's variants side by side, in turn: loaders, backends of the augmentation, and settings of the step.

Every function returns a benchmark record whose first row is the recipe as it stands.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from fastssl import build
from fastssl.augment.backend import backend_of
from fastssl.bench.parts import Parts, parts, work
from fastssl.bench.record import record, row
from fastssl.bench.timing import Step, side_by_side, waiter
from fastssl.data.loaders.choose import installed
from fastssl.errors import UserError
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


def loader(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of every loader that is installed, alone: batches are made, nothing is done with them."""
    device, notes = build.hardware.device(recipe), list[str]()
    labels = build.data.labels_of(recipe.data.path)
    sets = build.data.sets(recipe, labels, build.data.labels_of(recipe.data.probe_path or recipe.data.path))
    steps: dict[str, Step] = {}
    for name, changes in chosen(LOADERS, only).items():
        if name in PACKAGES and not installed(PACKAGES[name]):
            notes.append(f"{name} is not installed and left out.")
        elif name != "resident, host memory" or device.type != "cpu":  # on the CPU they are one
            made = build.data.loader(load(recipe, changes), recipe.data.path, sets.train, device=device)
            steps[name] = loading(made)
            if next(iter(made.epoch(0))).offsets_B is not None and name == "resident":
                notes.append("resident: nothing is copied, a batch is places in the buffer of all images.")
    return measured("loader", recipe, steps, device=device, seconds=seconds, rounds=rounds, notes=notes)


def loading(made: build.data.Loader) -> Step:
    batches = (batch for epoch in cycle(range(1 << 20)) for batch in made.epoch(epoch))
    return lambda: len(next(batches))


def augment(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of every backend in bfloat16 and float32, on one batch of the recipe's images."""
    made = parts(load(recipe, ["train.compile=false", "augment.backend=torch"]))  # a batch that lies as any takes it
    batch, epoch = next(made.batches())
    fused = {"cpu": ["cpu"], "cuda": ["cuda"]}.get(made.device.type, [])
    steps: dict[str, Step] = {}
    for backend in chosen(dict.fromkeys([*fused, "torch"]), only):
        for dtype in (made.augment.dtype, *({torch.bfloat16, torch.float32} - {made.augment.dtype})):
            one = replace(made, augment=replace(made.augment, backend=backend_of(backend), dtype=dtype))  # type: ignore[arg-type]
            steps[f"{backend}, {str(dtype).removeprefix('torch.')}"] = cutting(one, batch, epoch)
    return measured("augment", recipe, steps, device=made.device, seconds=seconds, rounds=rounds, notes=[])


def cutting(made: Parts, batch: Any, epoch: int) -> Step:
    def step() -> int:
        made.views(batch, epoch)
        return len(batch)

    return step


def step(recipe: Recipe, *, seconds: float, only: list[str] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Images per second of the step, fed views that stay in memory, with one setting changed at a time.

    "as trained" also loads and augments: its `share_of_fixed` row is what that costs (1 is nothing).
    """
    steps: dict[str, Step] = {}
    notes: list[str] = []
    device = build.hardware.device(recipe)
    for name, changes in chosen(settings(recipe, device), only).items():
        try:
            made = parts(load(recipe, changes))
            steps[name] = training(made) if name == "as trained" else fixed(made)
            with torch_settings(recipe):
                steps[name]()
        except RuntimeError as error:  # a compiler that is absent, a precision that the device lacks
            notes.append(f"{name} does not run here and is left out: {str(error).splitlines()[0][:150]}")
            steps.pop(name, None)
    result = measured("step", recipe, steps, device=device, seconds=seconds, rounds=rounds, notes=notes)
    by_name = {one["impl"]: one["values"] for one in result["rows"]}
    if {"fixed batch", "as trained"} <= by_name.keys():
        ratios = [fast / slow for fast, slow in zip(by_name["fixed batch"], by_name["as trained"], strict=True)]
        result["rows"].append(row("as trained", work(recipe, device), "time_against_fixed", ratios))
        result["notes"].append(f"Loading and augmentation make a step {sorted(ratios)[len(ratios) // 2]:.3f}x as long.")
    return result


def settings(recipe: Recipe, device: torch.device) -> dict[str, list[str]]:
    """Name to changes: the recipe fed a fixed batch and as trained, then each setting that matters turned over."""
    train = recipe.train
    other = "fp32" if train.precision != "fp32" else "bf16"
    flipped = {"channels_last": not train.channels_last, "compile": not train.compile}
    changes = {
        f"{name}={str(value).lower()}": [f"train.{name}={str(value).lower()}"] for name, value in flipped.items()
    }
    if device.type == "cuda" and train.compile != "reduce-overhead":  # what it adds to compiling is CUDA graphs
        changes["compile=reduce-overhead"] = ["train.compile=reduce-overhead"]
    return {"fixed batch": [], "as trained": [], f"precision={other}": [f"train.precision={other}"], **changes}


def fixed(made: Parts) -> Step:
    """Steps on one batch's views, cut beforehand."""
    batch, epoch = next(made.batches())
    groups = made.views(batch, epoch)

    def step() -> int:
        made.step(groups)
        return len(batch)

    return step


def training(made: Parts) -> Step:
    """Steps as the training loop takes them."""
    groups = made.trained_on()

    def step() -> int:
        made.step(next(groups))
        return made.batch_size

    return step


def measured(
    bench: str,
    recipe: Recipe,
    steps: dict[str, Step],
    *,
    device: torch.device,
    seconds: float,
    rounds: int,
    notes: list[str],
) -> dict[str, Any]:
    """The record of all variants' images per second."""
    wait: Callable[[], None] = waiter(device)
    window_s = seconds / max(1, len(steps)) / (rounds + 1)
    with torch_settings(recipe):
        rates = side_by_side(steps, wait=wait, window_s=window_s, rounds=rounds)
    what = work(recipe, device)
    return record(
        bench,
        [row(name, what, "images_per_s", values) for name, values in rates.items()],
        recipe.model_dump(mode="json"),
        data_digest=build.data.manifest_of(recipe.data.path).digest,
        warmup=f"a step and {window_s:.2f} s of each untimed",
        notes=notes,
    )


def chosen(variants: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    """Those whose name contains one of `only`, or all.

    Raises:
        UserError: when there is none.
    """
    found = {name: what for name, what in variants.items() if not only or any(word in name for word in only)}
    if not found:
        raise UserError(
            f"No variant's name has {' or '.join(only or ())} in it.", f"Choose from: {', '.join(variants)}."
        )
    return found
