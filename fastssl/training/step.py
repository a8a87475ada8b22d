"""One optimization step: views to embeddings to loss to weights. Nothing here waits for the device."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.build.optim import set_learning_rate
from fastssl.training.distributed import without_sync

Terms = dict[str, Tensor]


def train_step(
    network: Callable[..., Any],
    loss: Callable[[Tensor], Terms],
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Tensor],
    *,
    lr: float,
    autocast: torch.dtype | None,
    scaler: "torch.amp.GradScaler | None" = None,
    accumulate_steps: int = 1,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    replays_graphs: bool = False,
) -> Terms:
    """Forward, loss, backward and update.

    Args:
        network: a Pretrainer (or its compiled or data-parallel form).
        loss: embeddings (V, B, D) to terms; "loss" carries the gradient.
        groups: views, one (V_g, B, C, H, W) tensor per side length.
        lr: learning rate of this step.
        autocast: dtype of matrix products, or None for float32.
        scaler: of fp16's gradients.
        accumulate_steps: parts the batch is cut into; loss and batch statistics are each part's own.
        clip_norm: largest norm of the whole gradient.
        skip_nonfinite: leave weights, moments and batch statistics as they were when the gradient is not finite;
            costs a wait for the device and a copy of the statistics at every step.
        replays_graphs: the network replays CUDA graphs; what it gave in the step before is overwritten from here on.

    Returns:
        The loss's terms and "gradient_norm" (before clipping), detached, on the device, averaged over the parts;
        with `skip_nonfinite` also "skipped", 0 or 1.
    """
    set_learning_rate(optimizer, lr)
    if replays_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    kept = [(b, b.clone()) for b in network.buffers()] if skip_nonfinite and isinstance(network, nn.Module) else []
    total: Terms = {}
    parts = list(zip(*(group.chunk(accumulate_steps, dim=1) for group in groups), strict=True))
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else without_sync(network):
            with torch.autocast(part[0].device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                _, z_VBD = network(part)
            terms = loss(z_VBD)
            objective = terms["loss"] / accumulate_steps
            (scaler.scale(objective) if scaler else objective).backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            total[name] = total.get(name, 0) + term.detach() / accumulate_steps
    total["gradient_norm"], skipped = update(
        optimizer, scaler=scaler, clip_norm=clip_norm, skip_nonfinite=skip_nonfinite
    )
    if skipped:
        for buffer, before in kept:
            buffer.copy_(before)
    return total | {"skipped": torch.tensor(float(skipped))} if skip_nonfinite else total


def update(
    optimizer: torch.optim.Optimizer,
    *,
    scaler: "torch.amp.GradScaler | None",
    clip_norm: float | None,
    skip_nonfinite: bool = False,
) -> tuple[Tensor, bool]:
    """The gradient's Euclidean norm before clipping, on the device, and whether the step was left out."""
    if scaler:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    skipped = skip_nonfinite and not bool(torch.isfinite(norm))
    if scaler:
        scaler.step(optimizer)  # leaves out a step whose gradient is not finite by itself
        scaler.update()
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
