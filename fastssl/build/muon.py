"""Muon: steps of matrices and kernels made orthogonal, AdamW for vectors."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic, steep at 0: singular values end between 0.7 and 1.2
ITERATIONS = 5
NEARLY_SQUARE = 1.5  # columns for a row: below, iterating on x itself takes fewer products
RMS = 0.2  # of an update of AdamW, about


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), at the learning rates of AdamW (Liu et al. 2025, eq. 4).

    The step of a matrix w of n rows and m columns, or of a kernel whose axes after the first are taken together, is
    `w = w - lr * (decay * w + 0.2 * sqrt(max(n, m)) * orthogonal(v))` with Nesterov's v of the gradients: every
    direction of w moves alike, whatever the gradient's singular values, and an element moves as far as with AdamW.
    Vectors take the steps of AdamW.

    Args:
        groups: parameters with their `weight_decay`.
        lr: starting rate.
        momentum: of matrices and kernels, in [0, 1).
        betas: of vectors, each in [0, 1).
        fused: AdamW in one kernel; torch then keeps the number of the step on the parameters' device, at a resume too.
        capturable: a CUDA graph may hold the update.

    Attributes:
        run_all: makes the updates of matrices of each shape; one after another as it comes, in threads as `map` of a
            pool. The bits are the same.
    """

    run_all: Callable[[Callable[[list[Tensor]], list[Tensor]], list[list[Tensor]]], Iterable[list[Tensor]]] = map

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        fused: bool,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"fused": fused, "capturable": capturable})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            self.step_matrices(group, [p for p in parameters if p.ndim > 1])
            self.step_vectors(group, [p for p in parameters if p.ndim <= 1])

    def step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        gradients, velocities = [p.grad for p in parameters if p.grad is not None], self.states("velocity", parameters)
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, velocities, group["momentum"])
        by_shape = defaultdict[torch.Size, list[int]](list)
        for i, v in enumerate(ahead):
            by_shape[v.flatten(1).shape].append(i)
        # the longest first, so that threads end together
        alike = sorted(by_shape.values(), key=lambda places: products(len(places), ahead[places[0]]), reverse=True)
        given = [[ahead[i] for i in places] for places in alike]
        updates = list(ahead)
        for places, made in zip(alike, self.run_all(update_of, given), strict=True):
            for i, update in zip(places, made, strict=True):
                updates[i] = update
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        subtract(parameters, updates, group["lr"])

    def step_vectors(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        (beta1, beta2), on_device = group["betas"], group["fused"] or group["capturable"]
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if on_device else "cpu")
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            self.states("exp_avg", parameters),
            self.states("exp_avg_sq", parameters),
            [],
            [self.state[p]["step"] for p in parameters],
            fused=group["fused"],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def states(self, name: str, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What is kept of each parameter under a name, 0 at first."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]


def update_of(velocities: Sequence[Tensor]) -> list[Tensor]:
    """Velocities of one shape made orthogonal, at the size of AdamW's updates."""
    x_Nnm = torch.stack([v.flatten(1) for v in velocities])
    ortho_Nnm = orthogonal(x_Nnm) * (RMS * max(x_Nnm.shape[1:]) ** 0.5)
    return [ortho_nm.view(v.shape) for ortho_nm, v in zip(ortho_Nnm, velocities, strict=True)]


def products(count: int, velocity: Tensor) -> int:
    """Of `update_of` of so many of a shape, up to a factor."""
    sides = velocity.flatten(1).shape
    return count * min(sides) ** 2 * max(sides)


def subtract(parameters: list[Tensor], updates: list[Tensor], lr: float | Tensor) -> None:
    """Updates times a rate, which may lie on the device, off the parameters."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_sub_(parameters, updates, alpha=lr)


def orthogonal(x_Nnm: Tensor) -> Tensor:
    """Matrices (N, n, m) with the singular vectors of `x`, and singular values of about 1, float32.

    Jordan's iteration x = a x + b (x x') x + c (x x')² x, five times. Every iterate is a polynomial of x x' times x, so
    matrices far from square are left out of the iteration: for a kernel of 3 x 3 that is a third of the work.
    """
    if x_Nnm.shape[-2] > x_Nnm.shape[-1]:
        return orthogonal(x_Nnm.mT).mT
    a, b, c = COEFFICIENTS
    x_Nnm = x_Nnm.float()
    x_Nnm = x_Nnm / x_Nnm.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if x_Nnm.shape[-1] < NEARLY_SQUARE * x_Nnm.shape[-2]:
        for _ in range(ITERATIONS):
            gram_Nnn = x_Nnm @ x_Nnm.mT
            change_Nnn = torch.baddbmm(gram_Nnn, gram_Nnn, gram_Nnn, beta=b, alpha=c)
            x_Nnm = torch.baddbmm(x_Nnm, change_Nnn, x_Nnm, beta=a)
        return x_Nnm
    gram_Nnn = x_Nnm @ x_Nnm.mT
    product_Nnn = torch.eye(gram_Nnn.shape[-1], device=x_Nnm.device).expand_as(gram_Nnn)
    for i in range(ITERATIONS):  # all of them are polynomials of the first, so they commute
        change_Nnn = torch.baddbmm(gram_Nnn, gram_Nnn, gram_Nnn, beta=b, alpha=c)
        product_Nnn = torch.baddbmm(product_Nnn, change_Nnn, product_Nnn, beta=a)
        if i < ITERATIONS - 1:
            half_Nnn = torch.baddbmm(gram_Nnn, change_Nnn, gram_Nnn, beta=a)
            gram_Nnn = torch.baddbmm(half_Nnn, half_Nnn, change_Nnn, beta=a)
    return product_Nnn @ x_Nnm
