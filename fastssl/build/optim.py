"""Optimizers and the learning rate, a pure function of the step (so a resume needs no scheduler state)."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.recipe.schema import Recipe


def optimizer(recipe: Recipe, module: nn.Module, *, device: torch.device) -> torch.optim.Optimizer:
    spec = recipe.optim
    groups = parameter_groups([module], weight_decay=spec.weight_decay)
    return make_optimizer(
        spec.name, groups, lr=spec.lr, momentum=spec.momentum, betas=spec.betas, trust=spec.trust, device=device
    )


def learning_rate(recipe: Recipe, *, steps_per_epoch: int) -> Callable[[int], float]:
    """Step to learning rate."""
    spec = recipe.optim
    return partial(
        learning_rate_at,
        base=spec.lr,
        warmup_steps=math.ceil(spec.warmup_epochs * steps_per_epoch),
        total_steps=recipe.train.epochs * steps_per_epoch,
        schedule=spec.schedule,
        final_fraction=spec.final_fraction,
    )


def learning_rate_at(
    step: int, *, base: float, warmup_steps: int, total_steps: int, schedule: str, final_fraction: float
) -> float:
    """The learning rate of a step: linear warm-up from base / warmup_steps, then constant or half a cosine.

    Args:
        step: from 0 to total_steps - 1.
        base: the rate at the end of warm-up.
        warmup_steps: steps before `base` is reached; 0 starts at `base`.
        total_steps: where the cosine reaches `base * final_fraction`.
        schedule: "constant" or "cosine".
        final_fraction: in [0, 1]; ignored when constant.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return base * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(modules: Iterable[nn.Module], *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay, vectors (norms and biases) without.

    The parameter's rank decides, not its name: names miss the norms inside `downsample`.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    betas: tuple[float, float],
    trust: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Adam, AdamW, SGD (fused on CPU and CUDA, foreach elsewhere) or LARS.

    Args:
        name: "adam" (weight decay inside the gradient), "adamw", "sgd" or "lars".
        groups: from `parameter_groups`.
        lr: starting rate; the loop overwrites it every step.
        momentum: of sgd and lars, in [0, 1).
        betas: of adam and adamw, each in [0, 1).
        trust: LARS trust coefficient (0.001 in You et al. 2017).
        device: where the parameters are.
    """
    kernels: dict[str, bool] = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, **kernels)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, **kernels)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, **kernels)
    if name == "lars":
        return Lars(groups, lr=lr, momentum=momentum, trust=trust)
    raise AssertionError(name)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, eq. 6), foreach over all parameters.

    The update of a matrix or kernel w with gradient g is `v = momentum * v + lr * local * (g + decay * w)`, with
    `local = trust * |w| / |g + decay * w|`, or 1 where either norm is 0.
    Vectors are not adapted (as in Barlow Twins' own code).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, trust: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self.update(group, parameters)

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        directions = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        locals_ = [
            local_rate(w, norm_w, norm_d, group["trust"])
            for w, norm_w, norm_d in zip(
                parameters, torch._foreach_norm(parameters), torch._foreach_norm(directions), strict=True
            )
        ]
        torch._foreach_mul_(directions, locals_)
        velocities = []
        for p in parameters:
            state = self.state[p]
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p)
            velocities.append(state["velocity"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, directions, alpha=group["lr"])
        torch._foreach_sub_(parameters, velocities)


def local_rate(w: Tensor, norm_w: Tensor, norm_d: Tensor, trust: float) -> Tensor:
    if w.ndim <= 1:
        return torch.ones_like(norm_w)
    # torch.where, not if: a comparison on the host would wait for the device in every step
    return torch.where((norm_w > 0) & (norm_d > 0), trust * norm_w / norm_d.clamp_min(1e-30), 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
