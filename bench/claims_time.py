"""Seconds of a training step of each cell, measured apart from the runs, so that the time axis is the machine's best.

Runs last hours, and others may use the machine meanwhile: their own seconds then say more about the neighbors than
about the method. So each kind of step (views, batch, projector) is timed alone: views and step on real images, all
kinds one after another in every round, and the fastest step counts; or each right after the same other one, and their
ratio counts. Threads share whole views or operators, as training would choose. Loading is left out: from memory it is
an index.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastssl import build
from fastssl.data.batch import Batch
from fastssl.recipe.schema import Recipe
from fastssl.training import guards, parallel
from fastssl.training.step import step_of

ROUNDS, STEPS = 4, 2


def seconds_per_step(
    recipes: Mapping[str, Recipe], kept: Path, *, again: bool = False, known: Mapping[str, float]
) -> dict[str, float]:
    """The fastest step of each named recipe in seconds.

    Args:
        recipes: by the name of their kind; all over one data file.
        kept: JSON of what was measured before; read first and written after.
        again: measure those already known too, and keep the faster.
        known: of an earlier record; it goes before what `kept` says, since the record's runs are counted in it.
    """
    of_kept: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    fastest_s = {**of_kept, **known}
    wanted = {name: recipe for name, recipe in recipes.items() if again or name not in fastest_s}
    if wanted:
        print(f"Timing a step of each of {', '.join(wanted)}", file=sys.stderr)
        for name, seconds in fastest(wanted).items():
            fastest_s[name] = min(seconds, fastest_s.get(name, seconds))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(fastest_s, indent=1) + "\n", encoding="utf-8")
    return {name: fastest_s[name] for name in recipes}


def fastest(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    steps = steps_of(recipes)
    rounds = [{name: seconds_now(step) for name, step in steps.items()} for _ in range(ROUNDS)]
    return {name: min(of_round[name] for of_round in rounds) for name in recipes}


def ratios(recipes: Mapping[str, Recipe], base: str, *, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of a step of each other recipe over those of the base's right before it, one ratio a round.

    A machine whose speed drifts changes both, so ratios of different occasions may be compared.

    Args:
        recipes: by name, the base's too; all over one data file.
        base: name of the recipe that the others are compared with.
        rounds: in each, every pair is timed once.
    """
    steps = steps_of(recipes)
    found: dict[str, list[float]] = {name: [] for name in recipes if name != base}
    for _ in range(rounds):
        for name, of_round in found.items():
            before_s = seconds_now(steps[base])
            of_round.append(seconds_now(steps[name]) / before_s)
    return found


def steps_of(recipes: Mapping[str, Recipe]) -> dict[str, Callable[[int], Tensor]]:
    device = build.hardware.device(next(iter(recipes.values())))
    if device.type == "cpu":
        guards.keep_freed_memory()  # as training does
    images = first_images(recipes, device)
    return {name: loss_of_a_step(recipe, images, device) for name, recipe in recipes.items()}


def seconds_now(step: Callable[[int], Tensor]) -> float:
    """The faster of a few steps, after one that is not counted: the caches are another cell's."""
    float(step(0))
    fastest_s = float("inf")
    for epoch in range(1, STEPS + 1):
        start = time.perf_counter()
        float(step(epoch))
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return fastest_s


def first_images(recipes: Mapping[str, Recipe], device: torch.device) -> Tensor:
    """As many images as the largest batch takes; images of one size only."""
    largest = max(recipes.values(), key=lambda recipe: recipe.data.batch_size)
    reading = largest.model_copy(
        update={
            "augment": largest.augment.model_copy(update={"backend": "torch"}),  # which takes no batch in place
            "evaluate": largest.evaluate.model_copy(update={"batch_size": largest.data.batch_size}),
        }
    )
    batch = next(
        build.data.ordered_loader(
            reading, reading.data.path, torch.arange(reading.data.batch_size), device=device
        ).epoch(0)
    )
    assert batch.offsets_B is None, "the claims are measured on images of one size"
    return batch.images


def loss_of_a_step(recipe: Recipe, images: Tensor, device: torch.device) -> Callable[[int], Tensor]:
    """One step of the recipe as a function of the epoch, which gives its loss."""
    manifest = build.data.manifest_of(recipe.data.path)
    network = build.model.network(recipe, in_channels=manifest.channels, device=device)
    step = step_of(recipe, network, device=device)
    chosen, _ = parallel.choose(recipe, step, network, in_channels=manifest.channels, device=device)
    if chosen == parallel.VIEWS:
        step = parallel.view_parallel(step, network, workers=torch.get_num_threads())
    augment = build.views.augment(recipe, manifest, device=device)
    index_B = torch.arange(min(recipe.data.batch_size, len(images)), device=device)
    batch = Batch(images[: len(index_B)], index_B, index_B)

    def loss(epoch: int) -> Tensor:
        return step(augment(batch, epoch), recipe.optim.lr)["loss"]

    return loss
