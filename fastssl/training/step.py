"""One optimization step: views to embeddings to loss to weights. Nothing here waits for the device.

V views, B images, D embedding dimensions.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import build
from fastssl.build.optim import set_learning_rate
from fastssl.losses.loss import Terms
from fastssl.recipe.schema import Recipe
from fastssl.training.distributed import agree, without_sync
from fastssl.training.objective import Objective, Views, objective
from fastssl.training.step_graph import StepGraphs
from fastssl.training.view_parallel import intra_op_threads


def itself(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Step:
    """Forward, loss, backward and update, built once for a run: `terms = step(views, lr, number=n)`.

    Benchmarks call its parts one by one: `parts`, then `forward` and `backward` of each, then `update`.

    Attributes:
        network: a Pretrainer, or its data-parallel form.
        loss: embeddings (V, B, D) to terms; "loss" carries the gradient.
        optimizer: of the network's parameters.
        autocast: dtype of matrix products, or None for float32.
        scaler: of fp16's gradients.
        seeds: the number of a step to the `seed` that the loss takes, None where it takes none.
        accumulate_steps: parts the batch is cut into; loss and batch statistics are each part's own.
        clip_norm: largest norm of the whole gradient.
        skip_nonfinite: leave weights, moments and batch statistics as they were when loss or gradient is not finite;
            costs a wait for the device and a copy of the statistics at every step.
        replays_graphs: the network replays CUDA graphs; what it gave in the step before is overwritten from here on.
        threads: per operator of the calling thread while it takes a step; None leaves them as they are.
        compiled: network and loss as one compiled module, called in place of both; None where nothing is compiled.
        graphs: replay the whole step as one CUDA graph; None where its operators are launched one by one.
    """

    network: Callable[..., Any]
    loss: Callable[..., Terms]
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None = None
    scaler: "torch.amp.GradScaler | None" = None
    seeds: Callable[[int], int] | None = None
    accumulate_steps: int = 1
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    replays_graphs: bool = False
    threads: int | None = None
    compiled: Callable[[Views, Tensor | None], Terms] | None = None
    graphs: StepGraphs | None = None

    def __call__(self, views: Views, lr: float, *, number: int = 0) -> Terms:
        """One step.

        Args:
            views: one (V_g, B, C, H, W) tensor per side length.
            lr: learning rate of this step.
            number: of this step, from 0; what a loss draws at random follows from it.

        Returns:
            The loss's terms and "gradient_norm" (before clipping), detached, on the device, averaged over the parts;
            with `skip_nonfinite` also "skipped", 0 or 1.
        """
        seed = self.seed(number, views[0].device)
        with intra_op_threads(self.threads or torch.get_num_threads()):
            return self.graphs(self.take, views, lr, seed) if self.graphs else self.take(views, lr, seed)

    def seed(self, number: int, device: torch.device) -> Tensor | None:
        """What the loss draws from at a step, on the device; None where it draws nothing."""
        if self.seeds is None:
            return None
        # filled on the device: a number copied from the host would be waited for
        return torch.full((), self.seeds(number), dtype=torch.int64, device=device)

    def take(self, views: Views, lr: float | Tensor, seed: Tensor | None) -> Terms:
        """One step, on the threads that are set, with all that changes from step to step in its arguments."""
        set_learning_rate(self.optimizer, lr)
        before = self.statistics() if self.skip_nonfinite else []
        called = self.network if self.compiled is None else self.compiled  # a compiled module has no truth value
        total: Terms = {}
        parts = self.parts(views)
        for i, part in enumerate(parts):
            with contextlib.nullcontext() if i == len(parts) - 1 else without_sync(called):
                terms = self.forward(part, seed)
                self.backward(terms)
            for name, term in terms.items():
                total[name] = total.get(name, 0) + term.detach() / self.accumulate_steps
        total["gradient_norm"], skipped = self.update(total["loss"])
        if skipped:
            for buffer, value in before:
                buffer.copy_(value)
        return total | {"skipped": torch.tensor(float(skipped))} if self.skip_nonfinite else total

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Every buffer of the network and a copy of it."""
        assert isinstance(self.network, nn.Module)
        return [(buffer, buffer.clone()) for buffer in self.network.buffers()]

    def parts(self, views: Views) -> list[tuple[Tensor, ...]]:
        """The views of `accumulate_steps` parts of the batch."""
        if self.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return list(zip(*(cut(group, self.accumulate_steps) for group in views), strict=True))

    def forward(self, part: Views, seed: Tensor | None = None) -> Terms:
        """The loss's terms of these views; without a seed, with that of step 0."""
        if seed is None:
            seed = self.seed(0, part[0].device)
        if self.compiled is not None:
            return self.compiled(part, seed)
        return objective(self.network, self.loss, part, autocast=self.autocast, seed=seed)

    def backward(self, terms: Terms) -> None:
        """Adds the part's share to the gradients."""
        share = terms["loss"] / self.accumulate_steps
        (self.scaler.scale(share) if self.scaler else share).backward()  # type: ignore[no-untyped-call]

    def update(self, loss: Tensor | float = 0.0) -> tuple[Tensor, bool]:
        """The gradient's Euclidean norm before clipping, on the device, and whether the step was left out.

        Args:
            loss: of the step; it may be infinite where its gradient is not.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        skipped = self.skip_nonfinite and not bool(torch.isfinite(norm + loss))
        if self.skip_nonfinite:  # by all or by none: a loss of one's own has a value of its own on each rank
            skipped = bool(agree(int(skipped), norm.device))
        if not skipped:
            # fp16's scaler leaves out a step whose gradient is not finite by itself
            self.scaler.step(self.optimizer) if self.scaler else self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped


def cut(views_VBCHW: Tensor, parts: int) -> list[Tensor]:
    """The batch in parts, each in the memory layout of the whole: of a mere slice `.flatten(0, 1)` makes NCHW."""
    if parts == 1:
        return [views_VBCHW]
    views_VBHWC = views_VBCHW.permute(0, 1, 3, 4, 2)
    if not views_VBHWC.is_contiguous():
        return list(views_VBCHW.chunk(parts, dim=1))
    return [part.contiguous().permute(0, 1, 4, 2, 3) for part in views_VBHWC.chunk(parts, dim=1)]


def step_of(
    recipe: Recipe,
    network: nn.Module,
    *,
    device: torch.device,
    loss: Callable[..., Terms] | None = None,
    parallel: Callable[[nn.Module], nn.Module] = itself,
    may_compile: bool = False,
) -> Step:
    """The recipe's step.

    Args:
        recipe: decides everything.
        network: holds the weights.
        device: of the network.
        loss: in place of the recipe's.
        parallel: makes the module that is called data-parallel.
        may_compile: compile network and loss together where the recipe says so; else nothing is compiled.
    """
    build.optim.check_trainable(network)
    of_embeddings, autocast = build.losses.loss(recipe) if loss is None else loss, build.hardware.autocast(recipe)
    compiled, called = None, network
    if may_compile and recipe.train.compile:
        both = Objective(network, of_embeddings, autocast=autocast)
        around = parallel(both)  # inside the compiler, which then lets gradients travel before the backward has ended
        compiled = build.model.compiled(recipe, around, fullgraph=loss is None and around is both)
    else:
        called = parallel(network)
    return Step(
        network=called,
        loss=of_embeddings,
        optimizer=build.optim.optimizer(recipe, network, device=device),
        autocast=autocast,
        seeds=build.losses.seeds(recipe) if loss is None else None,
        scaler=torch.amp.GradScaler(device.type) if build.hardware.precision(recipe) == "fp16" else None,
        accumulate_steps=recipe.optim.accumulate_steps,
        clip_norm=recipe.optim.clip_norm,
        skip_nonfinite=recipe.train.on_nonfinite == "skip",
        replays_graphs=build.model.replays_graphs(recipe),
        compiled=compiled,
        graphs=StepGraphs() if recipe.train.cuda_graph and not build.hardware.graph_hindrance(recipe, device) else None,
    )
