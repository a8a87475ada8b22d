"""One optimisation step: views to embeddings to loss to weights. Nothing here waits for the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.optim import set_learning_rate

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

    Returns:
        The loss's terms, detached, on the device, averaged over the parts.
    """
    set_learning_rate(optimizer, lr)
    total: Terms = {}
    for part in zip(*(group.chunk(accumulate_steps, dim=1) for group in groups), strict=True):
        with torch.autocast(part[0].device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            _, z_VBD = network(part)
        terms = loss(z_VBD)
        objective = terms["loss"] / accumulate_steps
        (scaler.scale(objective) if scaler else objective).backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            total[name] = total.get(name, 0) + term.detach() / accumulate_steps
    update(optimizer, scaler=scaler, clip_norm=clip_norm)
    return total


def update(
    optimizer: torch.optim.Optimizer,
    *,
    scaler: "torch.amp.GradScaler | None",
    clip_norm: float | None,
) -> None:
    if clip_norm is not None:
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
