"""Optimizers and the learning rate, a pure function of the step (so a resume needs no scheduler state)."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from fastssl.build import hardware
from fastssl.build.muon import Muon, subtract
from fastssl.errors import UserError
from fastssl.recipe.schema import Optimizer, Recipe, Schedule


def optimizer(recipe: Recipe, module: nn.Module, *, device: torch.device) -> torch.optim.Optimizer:
    check_trainable(module)
    spec = recipe.optim
    groups = parameter_groups([module], weight_decay=spec.weight_decay, vectors=spec.decay_vectors)
    return make_optimizer(
        spec.name,
        groups,
        lr=spec.lr,
        momentum=spec.momentum,
        betas=spec.betas,
        trust=spec.trust,
        rate_in_momentum=spec.rate_in_momentum,
        capturable=recipe.train.cuda_graph and not hardware.graph_hindrance(recipe, device),
        device=device,
    )


def check_trainable(module: nn.Module) -> None:
    """UserError where every parameter is frozen."""
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError(
            "Nothing is left to train: the whole backbone is frozen, and the projector has no layers.",
            "Set model.freeze lower, or give model.projector widths.",
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
    step: int, *, base: float, warmup_steps: int, total_steps: int, schedule: Schedule, final_fraction: float
) -> float:
    """The learning rate of a step: linear warm-up from base / warmup_steps, then the schedule.

    Args:
        step: from 0 to total_steps - 1.
        base: the rate at the end of warm-up.
        warmup_steps: steps before `base` is reached; 0 starts at `base`.
        total_steps: where a decaying schedule reaches `base * final_fraction`.
        schedule: "constant", or "cosine": half a cosine from `base` down.
        final_fraction: in [0, 1]; ignored when constant.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match schedule:
        case "constant":
            return base
        case "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            assert_never(schedule)
    return base * (final_fraction + (1 - final_fraction) * decay)


def parameter_groups(
    modules: Iterable[nn.Module], *, weight_decay: float, vectors: bool = False
) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay, vectors (norms and biases) without, unless `vectors`.

    The parameter's rank decides, not its name: names miss the norms inside `downsample`.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": weight_decay if vectors else 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: Optimizer,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    betas: tuple[float, float],
    trust: float,
    device: torch.device,
    rate_in_momentum: bool = True,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Adam, AdamW, SGD (fused on CPU and CUDA, foreach elsewhere), LARS or Muon.

    Args:
        name: "adam" (weight decay inside the gradient), "adamw", "sgd", "lars" or "muon".
        groups: from `parameter_groups`.
        lr: starting rate; the loop overwrites it every step.
        momentum: of sgd, lars and muon, in [0, 1).
        betas: of adam, adamw and muon's vectors, each in [0, 1).
        trust: LARS trust coefficient (0.001 in You et al. 2017).
        device: where the parameters are.
        rate_in_momentum: of lars, see `Lars`.
        capturable: a CUDA graph may hold the update.
    """
    kernels: dict[str, bool] = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    match name:
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, capturable=capturable, **kernels)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, capturable=capturable, **kernels)
        case "sgd":
            sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, **kernels)
            # torch's fused kernel leaves them uninitialized where fp16's scaler leaves the first step out
            sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters_of(sgd) if momentum})
            return sgd
        case "lars":
            return Lars(groups, lr=lr, momentum=momentum, trust=trust, rate_in_momentum=rate_in_momentum)
        case "muon":
            return Muon(groups, lr=lr, momentum=momentum, betas=betas, fused="fused" in kernels, capturable=capturable)
        case _:
            assert_never(name)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, eq. 6), foreach over all parameters.

    The update of a matrix or kernel w with gradient g is `v = momentum * v + lr * local * (g + decay * w)`, with
    `local = trust * |w| / |g + decay * w|`, or 1 where either norm is 0, then `w = w - v`. With `rate_in_momentum`
    False it is `v = momentum * v + local * (g + decay * w)`, then `w = w - lr * v`, as in the Barlow Twins and VICReg
    codes: the same while the rate is constant.
    Vectors are not adapted (as in Barlow Twins' own code).
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, trust: float, rate_in_momentum: bool = True
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"rate_in_momentum": rate_in_momentum})
        self.buffers: dict[tuple[int, ...], tuple[Tensor, list[Tensor], Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for is_vector in (False, True):
                parameters = [p for p in with_gradient if (p.ndim <= 1) is is_vector]
                if parameters:
                    self.update(group, parameters)

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if parameters[0].ndim > 1:
            directions = self.adapted(group, parameters, gradients)
        else:
            directions = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        for p in parameters:
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
        velocities = [self.state[p]["velocity"] for p in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        if group["rate_in_momentum"]:
            subtract(velocities, directions, -group["lr"])
            torch._foreach_sub_(parameters, velocities)
        else:
            torch._foreach_add_(velocities, directions)
            subtract(parameters, velocities, group["lr"])

    def adapted(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Directions times their local rates.

        They lie one after another in one buffer, each as its parameter does in memory: a rate per tensor is then one
        product with a row of rates, where foreach would launch a kernel per tensor.
        """
        flat, directions, tensor_of_element = self.buffer(parameters)
        torch._foreach_copy_(directions, gradients)
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        norms_w = torch.stack(torch._foreach_norm(parameters))
        norms_d = torch.stack(torch._foreach_norm(directions))
        # torch.where, not if: a comparison on the host would wait for the device in every step
        local = group["trust"] * norms_w / norms_d.clamp_min(1e-30)
        rates = torch.where((norms_w > 0) & (norms_d > 0), local, 1.0)
        flat.mul_(rates.index_select(0, tensor_of_element))
        return directions

    def buffer(self, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """The flat buffer, each parameter's place in it, and the tensor that each element belongs to; made once."""
        key = tuple(id(p) for p in parameters)
        if key not in self.buffers:
            sizes, like = [p.numel() for p in parameters], parameters[0]
            flat = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
            places = zip(parameters, itertools.accumulate(sizes, initial=0), strict=False)
            numbers = torch.arange(len(sizes), dtype=torch.int32, device=like.device)
            self.buffers[key] = (
                flat,
                [flat.as_strided(p.shape, p.stride(), at) for p, at in places],
                numbers.repeat_interleave(torch.tensor(sizes, device=like.device), output_size=sum(sizes)),
            )
        return self.buffers[key]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """For the next update; a tensor is read on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
