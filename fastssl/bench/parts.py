"""The parts of a recipe's step, and single steps of it, as every benchmark here uses them.

V views, B images, C channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.bench.timing import Laps
from fastssl.build.optim import set_learning_rate
from fastssl.data.batch import Batch
from fastssl.data.manifest import Manifest
from fastssl.losses.loss import Terms
from fastssl.models.pretrainer import Pretrainer
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.training import parallel
from fastssl.training.guards import keep_freed_memory
from fastssl.training.prefetch import prefetch_views
from fastssl.training.step import Step, step_of

Views = tuple[Tensor, ...]
STILL_LR = 1e-9


@dataclass
class Parts:
    """Everything one step needs. `train_step` calls the network compiled where the recipe says so, `plain` never is.

    Views have their full sides: of a progressive recipe these are the last epochs' steps.
    """

    recipe: Recipe
    device: torch.device
    manifest: Manifest
    sets: build.data.Sets
    loader: build.data.Loader
    augment: Augment
    plain: Pretrainer
    train_step: Step

    @property
    def batch_size(self) -> int:
        return self.recipe.data.batch_size

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Batches with their epochs, for ever."""
        return ((batch, epoch) for epoch in count() for batch in self.loader.epoch(epoch))

    def trained_on(self) -> Iterator[Views]:
        """The views of batch after batch, for ever, made as training makes them, while a step runs."""
        for epoch in count():
            batches, make_views = self.loader.epoch(epoch), partial(self.views, epoch=epoch)
            yield from prefetch_views(batches, make_views, self.device, backend=self.augment.backend)

    def views(self, batch: Batch, epoch: int) -> Views:
        return self.augment(batch, epoch)

    def step(self, views: Views) -> Terms:
        """One optimization step, its learning rate so small that many repeats leave the weights as they were."""
        return self.train_step(views, STILL_LR)

    def phases(self, batches: Iterator[tuple[Batch, int]], wait: Callable[[], None]) -> dict[str, float]:
        """Seconds of the phases of one step, the device waited for after each: the work of `step`, taken apart."""
        step = self.train_step
        set_learning_rate(step.optimizer, STILL_LR)
        laps = Laps(wait)
        batch, epoch = next(batches)
        laps("loader")
        views = self.views(batch, epoch)
        laps("augmentation")
        for part in step.parts(views):
            terms = step.forward(part)
            laps("forward")
            step.backward(terms)
            laps("backward")
        step.update()
        laps("optimizer")
        return laps.seconds


def parts(recipe: Recipe) -> Parts:
    """Builds what the recipe says, as training does.

    Raises:
        UserError: as training does.
    """
    device = build.hardware.device(recipe)
    build.views.check_backend(recipe, device)
    if device.type == "cpu":
        keep_freed_memory()
    data = recipe.data
    manifest = build.data.manifest_of(data.path)
    sets = build.data.sets(recipe, build.data.labels_of(data.path), build.data.labels_of(data.probe_path or data.path))
    plain = build.model.network(recipe, in_channels=manifest.channels, device=device)
    step = step_of(recipe, plain, device=device, may_compile=True)
    shared, _ = parallel.choose(recipe, step, plain, in_channels=manifest.channels, device=device)
    if shared == parallel.VIEWS:
        step = parallel.view_parallel(step, plain, workers=torch.get_num_threads())
    return Parts(
        recipe=recipe,
        device=device,
        manifest=manifest,
        sets=sets,
        loader=build.data.loader(recipe, data.path, sets.train, device=device),
        augment=build.views.augment(recipe, manifest, device=device),
        plain=plain,
        train_step=step,
    )


def work(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What a step of the recipe does, as a row's `work`."""
    return {
        "batch": recipe.data.batch_size,
        "views": len(view_table(recipe.augment)),
        "side_px": max(row.side_px for row in view_table(recipe.augment)),
        "backbone": f"{recipe.model.backbone} x{recipe.model.width:g} {recipe.model.stem}",
        "device": device.type,
    }
