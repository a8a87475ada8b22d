"""The parts of one run, built from its recipe before anything is written, and how far the run is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.build import ranks
from fastssl.data.manifest import Manifest
from fastssl.models.pretrainer import Pretrainer, features_dim, has_unused
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.runs.directory import Records
from fastssl.training.averaging import Average
from fastssl.training.distributed import data_parallel, synchronize_batch_norm
from fastssl.training.guards import FirstBadStep, SlowSteps, keep_freed_memory
from fastssl.training.online_probes import Prober
from fastssl.training.own_parts import OwnLoss, terms_of
from fastssl.training.saver import Saver
from fastssl.training.step import Step, step_of

Observer = Callable[[dict[str, Any]], None]


@dataclass
class Clock:
    """Seconds of training (compiling, evaluation, saving apart) and, of those, waiting for images and for views."""

    train_s: float = 0.0
    compile_s: float = 0.0
    load_s: float = 0.0
    views_s: float = 0.0

    def waited(self, load_s: float, views_s: float) -> None:
        """Adds to the waiting."""
        self.load_s += load_s
        self.views_s += views_s


@dataclass
class Run:
    """The parts of one run, and how far it is.

    Attributes:
        augment_of: gives an epoch's view table.
        network: holds the weights.
        train_step: views, learning rate and number of the step to terms.
        images_per_epoch: images that come in one epoch.
        average: of the network's weights, where the recipe asks for it.
        step: how many have been taken.
        parallel: what the threads of a CPU share, "views" or "operators"; empty until that is chosen.
        own_loss: the loss is a function from Python, and not the recipe's.
        loader_chosen: name of the loader, and why it was chosen.
    """

    recipe: Recipe
    run_dir: Path
    device: torch.device
    loader: build.data.Loader
    augment_of: Callable[[int], Augment]
    network: Pretrainer
    train_step: Step
    learning_rate: Callable[[int], float]
    prober: Prober
    manifest: Manifest
    observe: Observer
    records: Records
    saver: Saver
    images_per_epoch: int
    average: Average | None = None
    bad: FirstBadStep = field(default_factory=FirstBadStep)
    step: int = 0
    clock: Clock = field(default_factory=Clock)
    last: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    warned: set[str] = field(default_factory=set)
    parallel: str = ""
    slow_steps: SlowSteps = field(default_factory=SlowSteps)
    own_loss: bool = False
    loader_chosen: tuple[str, str] = ("", "")

    @property
    def views(self) -> int:
        return len(view_table(self.recipe.augment))

    @property
    def evaluated(self) -> Pretrainer:
        """The network that is evaluated: the average where there is one."""
        return self.average.network if self.average else self.network

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def total_steps(self) -> int:
        return self.recipe.train.epochs * len(self.loader)

    @property
    def images(self) -> int:
        """How many images, not views, the steps up to now took."""
        epochs, steps = divmod(self.step, len(self.loader))
        return epochs * self.images_per_epoch + steps * self.recipe.data.batch_size

    def warn(self, message: str) -> None:
        self.observe({"event": "warning", "message": message})

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.warn(message)

    def tell_progress(self, what: str, done: int, total: int) -> None:
        """Of work that is not steps, such as the linear probe at the end."""
        self.observe({"event": "progress", "what": what, "done": done, "total": total})

    def record(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and what the observer sees."""
        self.last = {**self.last, **record}
        self.records.write(record)
        self.observe(record)


def leaves_out(recipe: Recipe, network: Pretrainer, channels: int, device: torch.device) -> bool:
    """Whether ranks must expect parameters of a backbone from Python that get no gradient."""
    if ranks.world() == 1:
        return False
    side_px = build.model.sides_px(recipe)[0]
    images = torch.randn(2, channels, side_px, side_px, generator=torch.Generator().manual_seed(0))
    return has_unused(network.backbone, images.to(device))


def assemble(
    recipe: Recipe,
    folder: Path,
    observe: Observer,
    *,
    backbone: nn.Module | None = None,
    loss: OwnLoss | None = None,
    goes_on: bool = False,
) -> Run:
    """Builds every part; refuses what cannot work before anything is written.

    Args:
        recipe: decides everything.
        folder: the run's, written by rank 0 alone.
        observe: called with the records of rank 0.
        backbone, loss: in place of the recipe's, see `train`.
        goes_on: a checkpoint will be restored, so the weights that the run started from are not needed.
    """
    device = build.hardware.device(recipe)
    if device.type == "cpu":
        keep_freed_memory()
    manifest = build.data.manifest_of(recipe.data.path)
    probe_path = recipe.data.probe_path or recipe.data.path
    sets = build.data.sets(recipe, build.data.labels_of(recipe.data.path), build.data.labels_of(probe_path))
    loader_chosen = build.data.loader_choice(recipe, recipe.data.path, device)  # before it takes memory
    loader = build.data.loader(recipe, recipe.data.path, sets.train, device=device)
    start = build.model.drawn(recipe) if goes_on else recipe
    network = build.model.network(start, in_channels=manifest.channels, device=device, backbone=backbone)
    clean = build.views.clean_view(recipe, manifest, device=device)
    features_dim(
        network.backbone,
        side_px=clean.views[0].side_px,
        in_channels=manifest.channels,
        setting="evaluate.side_px",
    )
    synchronize_batch_norm(network, device, compiled=bool(recipe.train.compile))
    main = ranks.is_main()
    observe = observe if main else lambda record: None

    def on_warning(message: str) -> None:
        observe({"event": "warning", "message": message})

    return Run(
        recipe=recipe,
        run_dir=folder,
        device=device,
        loader=loader,
        augment_of=build.views.augment_of_epoch(recipe, manifest, device=device),
        network=network,
        train_step=step_of(
            recipe,
            network,
            device=device,
            loss=None if loss is None else terms_of(loss),
            parallel=partial(
                data_parallel,
                device=device,
                compression=recipe.train.gradient_compression,
                may_leave_out=backbone is not None and leaves_out(recipe, network, manifest.channels, device),
            ),
            may_compile=True,
        ),
        learning_rate=build.optim.learning_rate(recipe, steps_per_epoch=len(loader)),
        prober=Prober(
            recipe,
            probe_path,
            sets,
            clean=clean,
            device=device,
            share=loader if recipe.data.probe_path is None else None,
            pretraining=loader,
        ),
        manifest=manifest,
        images_per_epoch=build.data.images_per_epoch(recipe, loader, len(sets.train)),
        average=None if recipe.optim.ema is None else Average(network, decay=recipe.optim.ema),
        observe=observe,
        records=Records(folder / "metrics.jsonl" if main else None, on_warning),
        saver=Saver(
            folder / "checkpoints" if main else None, keep=recipe.train.keep_checkpoints, on_warning=on_warning
        ),
        own_loss=loss is not None,
        loader_chosen=loader_chosen,
    )
