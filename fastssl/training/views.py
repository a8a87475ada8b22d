"""The loader and the views for a loop of one's own: `for views, labels, index in fastssl.views("train.beton", ...)`.

Images are read and decoded once per step, views are cut on the device, and everything is a function of (seed, epoch,
image, view): order and pixels are the same whatever the batch size, the number of ranks, or where a run was resumed.
The order of a folder of shards depends on the number of ranks.

V views, B images of this rank, C channels, H W pixels.
"""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl import build
from fastssl.build import ranks
from fastssl.data.batch import Batch
from fastssl.errors import OwnWarning, UserError, errors_of, raise_all
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe, named
from fastssl.recipe.view import Row, row_of
from fastssl.training.plain import plain_torch
from fastssl.training.prefetch import prefetch_views

Item = tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor]
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LARGEST_DEFAULT_PX = 224


class Views:
    """An iterable of (views, labels, index); see `views`, which makes one.

    Iterating yields the current epoch's remaining steps; at its end the next epoch is current, so that every pass
    over it has new views. `set_epoch` chooses an epoch.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        build.views.check_backend(recipe, device)
        path = recipe.data.path
        self.recipe, self.device = recipe, device
        self.place = ranks.rank(), ranks.world()
        self.manifest = build.data.manifest_of(path)
        labels_N = build.data.labels_of(path)
        self.loader = build.data.loader(recipe, path, torch.arange(len(labels_N)), device=device)
        self.augment = build.views.augment(recipe, self.manifest, device=device)
        self.epoch = self.step = 0
        color = build.views.idle_color(recipe, self.manifest.channels, fix=False)
        for said in (color, build.views.fallback(recipe, self.augment, device=device, setting="backend")):
            if said:
                warnings.warn(said, OwnWarning, stacklevel=4)

    def __len__(self) -> int:
        """Steps of an epoch; a last batch that is not full is left out."""
        return len(self.loader)

    def __repr__(self) -> str:
        path, batch_size = self.recipe.data.path, self.recipe.data.batch_size
        return f"Views({path}, batch_size={batch_size}, views={len(self.augment.views)}, {self.device})"

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the current one, from its first step; nothing changes when it is current already."""
        check_place(epoch, 0, steps=len(self))
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0

    def __iter__(self) -> Iterator[Item]:
        """The current epoch from the current step on.

        Yields:
            views: (V, B, C, H, W), normalized, in the dtype asked for; `.flatten(0, 1)` of it is channels_last. Where
                rows differ in side_px, a tuple of one such tensor per run of rows of equal side.
            labels: int64 (B,), -1 for images without a label.
            index: int64 (B,), positions in the file.

        Raises:
            UserError: when torch.distributed was initialized since the views were made.
        """
        if self.place != (ranks.rank(), ranks.world()):
            raise UserError(
                f"This is rank {ranks.rank()} of {ranks.world()}, and fastssl.views(...) was called as rank "
                f"{self.place[0]} of {self.place[1]}, for other images.",
                "Initialize torch.distributed before fastssl.views(...); with Lightning call it in train_dataloader.",
            )
        epoch, batches = self.epoch, deque[tuple[Tensor, Tensor]]()

        def make(batch: Batch) -> tuple[Tensor, ...]:
            batches.append((batch.labels_B, batch.index_B))
            return self.augment(batch, epoch)

        prefetched = prefetch_views(
            self.loader.epoch(epoch, self.step), make, self.device, backend=self.augment.backend
        )
        while (groups := next_of(prefetched)) is not None:
            labels_B, index_B = batches.popleft()
            if self.device.type == "cuda":  # made on a side stream: not to be reused while this one reads them
                for tensor in (labels_B, index_B):
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            self.step += 1
            if self.step == len(self):
                self.epoch, self.step = epoch + 1, 0
            yield groups[0] if len(groups) == 1 else groups, labels_B, index_B

    def state_dict(self) -> dict[str, Any]:
        """Where iteration stands, as JSON values: the step after the one that was yielded last."""
        return {"epoch": self.epoch, "step": self.step, "ranks": self.place[1]} | self.identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` stood; the number of ranks may differ, but not within an epoch of shards.

        Raises:
            UserError: when the state is of other data, another seed or another batch size, or is none.
        """
        if not isinstance(state, Mapping):
            raise UserError(f"The state is a {type(state).__name__}.", "Pass what state_dict() gave.")
        differing = [key for key, value in self.identity().items() if state.get(key) != value]
        if differing:
            raise UserError(
                f"The state is of other views: {', '.join(differing)} differ.",
                "Build views(...) with the same file, seed and batch_size, or start without the state.",
            )
        check_place(state.get("epoch"), state.get("step"), steps=len(self))
        if self.recipe.data.path.is_dir() and state["step"] and state.get("ranks") != self.place[1]:
            raise UserError(
                f"The state is of {state.get('ranks', 'an unknown number of')} ranks in the middle of an epoch, and "
                f"{self.place[1]} read a folder of shards in another order.",
                "Continue with as many ranks, or from the beginning of an epoch: set_epoch(...).",
            )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def identity(self) -> dict[str, Any]:
        return {
            "data_digest": self.manifest.digest,
            "seed": self.recipe.seed,
            "batch_size": self.recipe.data.batch_size,
        }


def check_place(epoch: Any, step: Any, *, steps: int) -> None:
    """UserError for what is no epoch, or no step of one."""
    if not hasattr(epoch, "__index__") or epoch < 0:
        raise UserError(f"epoch is {epoch!r}.", "Set it to a whole number, 0 or more.")
    if not hasattr(step, "__index__") or not 0 <= step < steps:
        raise UserError(f"step is {step!r}, and an epoch has {steps} steps.", f"Set it to 0 to {steps - 1}.")


@plain_torch()
def next_of(prefetched: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
    return next(prefetched, None)


@plain_torch()
def views(
    path: str | Path,
    *,
    batch_size: int,
    views: int | Sequence[Row] = 4,
    preset: Literal["cifar", "stl", "imagenet", "imagenet_asymmetric", "multicrop"] = "cifar",
    side_px: int | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    loader: Literal["auto", "resident", "ffcv", "dali"] = "auto",
    memory: Literal["device", "host", "mmap"] = "device",
    backend: Literal["auto", "torch", "cpu", "cuda"] = "auto",
) -> Views:
    """Batches of augmented views of a converted data set, for a training loop of one's own.

    Args:
        path: a .beton file that `convert` wrote, or a folder of shards.
        batch_size: images of a step, >= 2, over all ranks where torch.distributed is initialized.
        views: V >= 2 rows of the preset, or the view table: one `View` or mapping of its fields per view.
        preset: what a number of views is cut by.
        side_px: of a number of views; when None the images' own side where they share one, at most 224.
        device: "auto", "cpu", "cuda", "mps" or a torch.device.
        dtype: of the views: float32, bfloat16 or float16.
        seed: of the order and of every draw.
        loader: what reads the images; see the recipe's `data`.
        memory: where they are held; see the recipe's `data`.
        backend: what cuts the views; see the recipe's `augment`.

    Raises:
        UserError: for everything a person can fix, naming the argument.

    Example:
        >>> train = fastssl.views("data/train.beton", batch_size=256, views=4)
        >>> for views, labels, index in train:  # (4, 256, C, H, W)
        ...     z = network(views.flatten(0, 1)).view(4, 256, -1)
        ...     loss = fastssl.losses.barlow_twins(z)["loss"]
    """
    try:
        if not isinstance(path, str | Path):
            raise ValueError(f"{path!r} is a {type(path).__name__}")
        path = Path(named(path))
    except ValueError as error:
        raise UserError(f"path: {error}.", "Name a .beton file, or a folder of shards.") from None
    raise_all(
        errors_of(
            lambda: precision_of(dtype),
            lambda: place_of(device),
            lambda: table_of(path, views, preset=preset, side_px=side_px),
        )
    )
    place = place_of(device)
    recipe = load(
        {
            "seed": seed,
            "device": place.type if place else "auto",
            "data": {"path": str(path), "batch_size": batch_size, "loader": loader, "memory": memory},
            "augment": table_of(path, views, preset=preset, side_px=side_px) | {"backend": backend},
            "train": {"epochs": 1, "precision": precision_of(dtype)},
        }
    )
    return Views(recipe, found_place(place, recipe))


def precision_of(dtype: torch.dtype) -> str:
    if dtype not in PRECISIONS:
        raise UserError(f"dtype is {dtype}.", "Set dtype to torch.float32, torch.bfloat16 or torch.float16.")
    return PRECISIONS[dtype]


def table_of(path: Path, views: object, *, preset: str, side_px: int | None) -> dict[str, Any]:
    """The recipe's `augment`, of a number of views or of a table of them."""
    if isinstance(views, int) and not isinstance(views, bool):
        if side_px is None:
            side_px = min(build.data.manifest_of(path).side_px or LARGEST_DEFAULT_PX, LARGEST_DEFAULT_PX)
        return {"preset": preset, "views": views, "side_px": side_px}
    if not isinstance(views, Sequence) or isinstance(views, str):
        raise UserError(
            f"views is {views!r}.", "Set views to a number, or to a list with one fastssl.View(...) per view."
        )
    if side_px is not None or preset != "cifar":
        raise UserError("side_px and preset are of a number of views, not of a table.", "Set side_px of each View.")
    return {"preset": "none", "rows": [row_of(row) for row in views]}


def found_place(place: torch.device | None, recipe: Recipe) -> torch.device:
    """The device asked for. One of CUDA without a number is the rank's under torchrun, else torch's current one.

    Raises:
        UserError: when it is not there.
    """
    if place is None or place.type != "cuda" or not torch.cuda.is_available():
        return build.hardware.device(recipe)
    if place.index is not None:
        return place
    if "LOCAL_RANK" in os.environ:
        return build.hardware.device(recipe)
    return torch.device("cuda", torch.cuda.current_device())


def place_of(device: str | torch.device) -> torch.device | None:
    """None where the machine decides."""
    if device == "auto":
        return None
    with contextlib.suppress(RuntimeError, TypeError):  # of a name that torch does not know, of no name
        place = torch.device(device)
        if place.type in ("cpu", "cuda", "mps"):
            return place
    raise UserError(f"device is {device!r}.", 'Set device to "auto", "cpu", "cuda" or "mps".')
