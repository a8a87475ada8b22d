"""A whole step as one CUDA graph: forward, loss, backward and update, launched at once.

Steps of small networks are so short that launching their operators takes longer than running them. What a graph reads
lies at fixed places in memory: a step's views, learning rate and seed are copied there, and all else is as it was when
the graph was captured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastssl.build import hardware
from fastssl.errors import UserError
from fastssl.losses.loss import Terms
from fastssl.recipe.schema import Recipe
from fastssl.training.objective import Views

WARM_UP_STEPS = 3  # of each shape of views, one operator after another: kernels get chosen, moments get their memory

Take = Callable[[Views, "float | Tensor", "Tensor | None"], Terms]
Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]


class StepGraphs:
    """Steps from graphs, one for each shape of views.

    Args:
        capture: records what a function does, without its effects, and returns what repeats it and where its result
            lies after each repetition.
    """

    def __init__(self, capture: "Capture | None" = None) -> None:
        self.capture = capture or capture_on_cuda
        self.by_shape: dict[Any, _StepGraph] = {}

    def __call__(self, take: Take, views: Views, lr: float, seed: Tensor | None) -> Terms:
        """What `take` does and returns.

        Args:
            take: views, learning rate and seed to terms; has no effects but on the device.
            views: one (V_g, B, C, H, W) tensor per side length.
            lr: learning rate of this step.
            seed: int64 scalar on the device for a loss that takes one.
        """
        shapes = tuple((group.shape, group.stride(), group.dtype) for group in views)
        if shapes not in self.by_shape:
            self.by_shape[shapes] = _StepGraph(take, views, seed, self.capture)
        return self.by_shape[shapes](views, lr, seed)


class _StepGraph:
    """Steps on views of one shape."""

    def __init__(self, take: Take, views: Views, seed: Tensor | None, capture: Capture) -> None:
        self.take, self.capture = take, capture
        self.views = [torch.empty_like(group) for group in views]
        self.lr = torch.zeros((), device=views[0].device)
        self.seed = None if seed is None else torch.empty_like(seed)
        self.names: tuple[str, ...] = ()
        self.warm_steps = 0
        self.graph: tuple[Callable[[], None], Tensor] | None = None

    def __call__(self, views: Views, lr: float, seed: Tensor | None) -> Terms:
        for mine, given in zip(self.views, views, strict=True):
            mine.copy_(given)
        self.lr.fill_(lr)
        if self.seed is not None and seed is not None:
            self.seed.copy_(seed)
        if self.warm_steps < WARM_UP_STEPS:
            self.warm_steps += 1
            values = on_another_stream(self.run) if self.lr.is_cuda else self.run()
        else:
            self.graph = self.graph or self.capture(self.run)
            replay, values = self.graph
            replay()
            values = values.clone()  # the next step overwrites them
        return dict(zip(self.names, values.unbind(), strict=True))

    def run(self) -> Tensor:
        """One step on what lies at the fixed places; its terms in the order of `names`."""
        terms = self.take(self.views, self.lr, self.seed)
        self.names = tuple(terms)
        return torch.stack([term.float().reshape(()) for term in terms.values()])


def on_another_stream(run: Run) -> Tensor:
    """As torch asks for before a capture."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values = run()
    torch.cuda.current_stream().wait_stream(stream)
    values.record_stream(torch.cuda.current_stream())
    return values


def capture_on_cuda(run: Run) -> tuple[Callable[[], None], Tensor]:
    """The graph of a function's kernels, and where they put its result.

    Raises:
        UserError: for a step that waits for the device, as a backbone or loss of one's own may.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # threads that load go on meanwhile
            values = run()
    except torch.OutOfMemoryError:
        raise  # explained by the loop
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The step cannot be captured as a CUDA graph ({reason}).", "Set train.cuda_graph to false."
        ) from error
    return graph.replay, values


def not_used(recipe: Recipe, device: torch.device) -> str:
    """What to say where the recipe asks for a graph and there is none; empty elsewhere."""
    why = hardware.graph_hindrance(recipe, device) if recipe.train.cuda_graph else ""
    return f"train.cuda_graph has no effect {why}: operators are launched one by one." if why else ""
