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
from fastssl.models.pretrainer import Pretrainer
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.training.guards import keep_freed_memory
from fastssl.training.prefetch import views_ahead
from fastssl.training.step import Terms, train_step, update

Views = tuple[Tensor, ...]
STILL_LR = 1e-9


@dataclass
class Parts:
    """Everything one step needs. `network` is compiled where the recipe says so, `plain` never.

    Views have their full sides: of a progressive recipe these are the last epochs' steps.
    """

    recipe: Recipe
    device: torch.device
    manifest: Manifest
    sets: build.data.Sets
    loader: build.data.Loader
    augment: Augment
    plain: Pretrainer
    network: Callable[..., Any]
    loss: Callable[[Tensor], Terms]
    optimizer: torch.optim.Optimizer
    scaler: "torch.amp.GradScaler | None"

    @property
    def batch_size(self) -> int:
        return self.recipe.data.batch_size

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Batches with their epochs, for ever."""
        return ((batch, epoch) for epoch in count() for batch in self.loader.epoch(epoch))

    def trained_on(self) -> Iterator[Views]:
        """The views of batch after batch, for ever, made as training makes them, while a step runs."""
        for epoch in count():
            yield from views_ahead(
                self.loader.epoch(epoch),
                partial(self.views, epoch=epoch),
                self.device,
                backend=self.augment.backend,
            )

    def views(self, batch: Batch, epoch: int) -> Views:
        return self.augment(batch, epoch)

    def step(self, groups: Views) -> Terms:
        """One optimization step, its learning rate so small that many repeats leave the weights as they were."""
        optim = self.recipe.optim
        return train_step(
            self.network,
            self.loss,
            self.optimizer,
            groups,
            lr=STILL_LR,
            autocast=build.hardware.autocast(self.recipe),
            scaler=self.scaler,
            accumulate_steps=optim.accumulate_steps,
            clip_norm=optim.clip_norm,
            replays_graphs=build.model.replays_graphs(self.recipe),
        )

    def phases(self, batches: Iterator[tuple[Batch, int]], wait: Callable[[], None]) -> dict[str, float]:
        """Seconds of the phases of one step, the device waited for after each: the work of `step`, taken apart."""
        set_learning_rate(self.optimizer, STILL_LR)
        laps = Laps(wait)
        batch, epoch = next(batches)
        laps("loader")
        groups = self.views(batch, epoch)
        laps("augmentation")
        autocast = build.hardware.autocast(self.recipe)
        for part in zip(*(group.chunk(self.recipe.optim.accumulate_steps, dim=1) for group in groups), strict=True):
            with torch.autocast(self.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                _, z_VBD = self.network(part)
            objective = self.loss(z_VBD)["loss"]
            laps("forward")
            (self.scaler.scale(objective) if self.scaler else objective).backward()  # type: ignore[no-untyped-call]
            laps("backward")
        update(self.optimizer, scaler=self.scaler, clip_norm=self.recipe.optim.clip_norm)
        laps("optimizer")
        return laps.seconds


def parts(recipe: Recipe) -> Parts:
    """Builds what the recipe says, as training does.

    Raises:
        UserError: as training does.
    """
    device = build.hardware.device(recipe)
    if device.type == "cpu":
        keep_freed_memory()
    data = recipe.data
    manifest = build.data.manifest_of(data.path)
    sets = build.data.sets(recipe, build.data.labels_of(data.path), build.data.labels_of(data.probe_path or data.path))
    plain = build.model.network(recipe, in_channels=manifest.channels, device=device)
    return Parts(
        recipe=recipe,
        device=device,
        manifest=manifest,
        sets=sets,
        loader=build.data.loader(recipe, data.path, sets.train, device=device),
        augment=build.views.augment(recipe, manifest, device=device),
        plain=plain,
        network=build.model.compiled(recipe, plain),
        loss=build.losses.loss(recipe),
        optimizer=build.optim.optimizer(recipe, plain, device=device),
        scaler=torch.amp.GradScaler(device.type) if recipe.train.precision == "fp16" else None,
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
