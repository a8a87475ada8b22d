"""What the threads of a CPU share: whole views or each operator. Tried for a moment, and written into the run."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from fastssl import build
from fastssl.build import ranks
from fastssl.build.muon import Muon
from fastssl.errors import UserError
from fastssl.models.pretrainer import Pretrainer, changing_buffer
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.training.step import Step
from fastssl.training.view_parallel import ViewParallel, intra_op_threads, replica_of

VIEWS, OPERATORS = "views", "operators"
TRIAL_IMAGES, TRIAL_CALLS = 64, 5
# Training also cuts views and updates weights on these cores, the trial does not: bench/peers/small.yaml with Muon ran
# at 7,300 views/s by views and 3,800 by operators, which were close in the trial (2 cores, n = 6;
# bench/tta_peers.py --peers "fastssl, Muon" -s train.parallel=views).
OPERATORS_TIMES_FASTER = 1.25


def view_parallel(step: Step, network: Pretrainer, *, workers: int) -> Step:
    """The same step with whole views side by side, and Muon's matrices too."""
    shared = ViewParallel(network, workers=workers)
    if isinstance(step.optimizer, Muon):
        step.optimizer.run_all = shared.pool.map
    return replace(step, network=shared, threads=1)


def close(step: Step) -> None:
    """Ends the step's threads."""
    if isinstance(step.network, ViewParallel):
        step.network.close()
        if isinstance(step.optimizer, Muon):
            step.optimizer.run_all = map


def choose(
    recipe: Recipe, step: Step, network: Pretrainer, *, in_channels: int, device: torch.device
) -> tuple[str, str]:
    """ "views" or "operators", and why.

    Raises:
        UserError: when the recipe asks for views where that cannot be.
    """
    obstacle = obstacle_to_views(recipe, device) or obstacle_in_network(recipe, network, in_channels=in_channels)
    if recipe.train.parallel == VIEWS and obstacle:
        raise UserError(f"train.parallel is views, but {obstacle}.", "Set train.parallel to auto.")
    if obstacle:
        return OPERATORS, obstacle
    if recipe.train.parallel != "auto":
        return recipe.train.parallel, "as the recipe says"
    if torch.get_num_threads() == 1:
        return VIEWS, "one thread"
    return trial(recipe, step, network, in_channels=in_channels)


def obstacle_to_views(recipe: Recipe, device: torch.device) -> str:
    """Why whole views cannot be shared out, empty where they can."""
    obstacles = {
        f"the device is {device.type}": device.type != "cpu",
        "model.batch_norm is joint": recipe.model.batch_norm == "joint",
        "train.compile is set": bool(recipe.train.compile),
        "train.gradient_checkpointing is set": recipe.train.gradient_checkpointing,
        "several ranks train": ranks.world() > 1,
    }
    return next((text for text, is_so in obstacles.items() if is_so), "")


def obstacle_in_network(recipe: Recipe, network: Pretrainer, *, in_channels: int) -> str:
    """What of a module of one's own keeps views from having a copy of it each, empty where nothing does."""
    try:
        replica_of(network)
    except (TypeError, RuntimeError) as error:
        return f"the backbone cannot be copied ({error})"
    side_px = build.model.sides_px(recipe)[0]
    images = torch.randn(2, in_channels, side_px, side_px, generator=torch.Generator().manual_seed(0))  # zeros stay 0
    name = changing_buffer(network.backbone, images)
    return f"the backbone changes its buffer {name}, of which each view would have its own" if name else ""


def trial(recipe: Recipe, step: Step, network: Pretrainer, *, in_channels: int) -> tuple[str, str]:
    """Forward and backward of random views both ways; weights and batch statistics stay as they were.

    Operators are chosen only where they are clearly faster.
    """
    threads, views = torch.get_num_threads(), random_views(recipe, in_channels, step.autocast or torch.float32)
    before = step.statistics()
    side_by_side = view_parallel(step, network, workers=threads)
    try:
        operators_s = fastest_s(step, views)
        with intra_op_threads(1):
            views_s = fastest_s(side_by_side, views)
    finally:
        close(side_by_side)
        step.optimizer.zero_grad(set_to_none=True)
        for buffer, value in before:
            buffer.copy_(value)
    name = VIEWS if views_s <= OPERATORS_TIMES_FASTER * operators_s else OPERATORS
    close_call = (
        f", which is not {OPERATORS_TIMES_FASTER} times as fast" if name == VIEWS and operators_s < views_s else ""
    )
    return name, f"{1e3 * views_s:.0f} ms by views, {1e3 * operators_s:.0f} ms by operators{close_call}"


def fastest_s(step: Step, views: tuple[Tensor, ...]) -> float:
    """Seconds of the fastest forward and backward pass, after one unmeasured."""
    seconds = []
    for _ in range(1 + TRIAL_CALLS):
        mark = time.perf_counter()
        for part in step.parts(views):
            step.backward(step.forward(part))
        seconds.append(time.perf_counter() - mark)
    return min(seconds[1:])


def random_views(recipe: Recipe, channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As the view table has them, of a few images."""
    generator, batch = torch.Generator().manual_seed(0), build.model.few_images(recipe, TRIAL_IMAGES)
    shapes = [(1, batch, row.side_px, row.side_px, channels) for row in view_table(recipe.augment)]
    return tuple(torch.randn(x, generator=generator).to(dtype).permute(0, 1, 4, 2, 3) for x in shapes)
