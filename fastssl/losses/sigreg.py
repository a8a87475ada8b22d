"""LeJEPA over any number of views: sketched isotropic Gaussian regularization (arXiv 2511.08544).

Views are pulled to their mean, and the embeddings of each view are compared with a standard Gaussian along random
directions, by characteristic functions (Epps and Pulley 1983): no matrix of D x D, so time and memory are linear in V,
B and D. V views, B images on this rank, N images over all ranks, D dimensions, S slices, K knots.
"""

import math

import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.losses.loss import RISK_FACTOR, Loss, Terms, Weight, check_weights
from fastssl.losses.statistics import AllSum, check_views, full_precision, identity, image_count, joined

LAST_KNOT, KNOTS = 3.0, 16  # as in the authors' code, less the knot at 0, where every characteristic function is 1
LAMBDA = 0.02  # the authors' example of several views on small images


def sigreg(
    z_VBD: Tensor,
    *,
    seed: int | Tensor,
    sigreg_weight: Weight = "auto",
    slices: int = 256,
    all_sum: AllSum = identity,
) -> Terms:
    """Pull views to their mean and the distribution of each view's embeddings to an isotropic Gaussian.

    The statistic of one view and one direction a is `N * integral |E exp(i t a'z) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt`
    over -3 to 3, by the trapezoidal rule; the term is its mean over views and directions. Invariance is the mean
    squared distance to the mean of all views.

    Args:
        z_VBD: embeddings (V, B, D), any float dtype, V >= 2. Terms are float32 whatever autocast says (float64 stays).
        seed: of the directions, 0 to 2^32 - 1: another at every step, and the same one on all ranks. An int64 scalar on
            the device where the loss is compiled: one graph then serves all steps.
        sigreg_weight: lambda in [0, 1], invariance having 1 - lambda; "auto" is 0.02.
        slices: S, how many directions, >= 1.
        all_sum: autograd-aware sum over ranks, `ranks.all_sum` under data parallelism.

    Returns:
        loss, invariance, sigreg: scalars, loss = (1 - lambda) * invariance + lambda * sigreg; "loss" carries the
        gradient, the other terms are detached.

    Raises:
        UserError: when z_VBD is not (V, B, D) with V >= 2, or an argument has another value than named here.
    """
    check_views(z_VBD)
    check_weights(sigreg_weight=sigreg_weight)
    check_draws(seed, slices)
    V, _, D = z_VBD.shape
    weight = weights(D, V, sigreg_weight=sigreg_weight)["sigreg_weight"]
    if not 0 <= weight <= 1:
        raise UserError(f"sigreg_weight is {weight:g}.", "Set it to auto or to a number from 0 to 1.")
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = full_precision(z_VBD)
        directions_DS = directions(D, slices, seed=seed, like=z_VBD)
        knots_K = torch.arange(1, KNOTS + 1, dtype=z_VBD.dtype, device=z_VBD.device) * (LAST_KNOT / KNOTS)
        distance = (z_VBD - z_VBD.mean(0)).square().sum()
        # View by view: (B, S, K) angles are the largest thing here, and several at a time would miss the cache.
        characteristic_V2SK = torch.stack([characteristic(z_BD @ directions_DS, knots_K) for z_BD in z_VBD])
        # Nothing else has to meet: directions are equal on all ranks, and the count travels with the sums.
        count, distance, sum_V2SK = joined([image_count(z_VBD), distance, characteristic_V2SK], all_sum)
        invariance = distance / (V * count * D)
        gauss_K = (-knots_K.square() / 2).exp()
        real_VSK, imaginary_VSK = (sum_V2SK / count).unbind(1)
        apart_VSK = (real_VSK - gauss_K).square() + imaginary_VSK.square()
        statistic = count * (apart_VSK @ (gauss_K * quadrature(knots_K))).mean()
        loss = (1 - weight) * invariance + weight * statistic
    # Detached: whoever keeps a term for a log would keep the graph of the step.
    return {"loss": loss, "invariance": invariance.detach(), "sigreg": statistic.detach()}


def check_draws(seed: int | Tensor, slices: int) -> None:
    """UserError naming the argument that is no whole number, or no direction at all."""
    if not hasattr(seed, "__index__") or (isinstance(seed, Tensor) and seed.is_floating_point()):
        raise UserError(f"seed is {seed!r}.", "Set it to a whole number, another at every step.")
    if not hasattr(slices, "__index__") or slices < 1:
        raise UserError(f"slices is {slices!r}.", "Set it to a whole number of 1 or more.")


@torch.no_grad()
def directions(dim: int, slices: int, *, seed: int | Tensor, like: Tensor) -> Tensor:
    """Unit vectors (D, S), uniform on the sphere, of the dtype and on the device of `like`: a pure function."""
    # By a hash and not by a generator, which no compiled graph can hold; in float32 whatever the embeddings are.
    count = torch.arange(dim * slices, device=like.device)
    radius, angle = (uniform(2 * count + i, seed) for i in (0, 1))
    normal_DS = ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).view(dim, slices).to(like.dtype)
    unit_DS: Tensor = normal_DS / normal_DS.norm(dim=0)
    return unit_DS


def uniform(count: Tensor, seed: int | Tensor) -> Tensor:
    """Float32 in (0, 1], a hash of each number below 2^32 and the seed."""
    bits = mixed(mixed(count) ^ seed)
    return (bits.float() + 0.5) * 2.0**-32


def mixed(bits: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits (C. Wellons' search for integer hashes), without overflow in int64."""
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return bits ^ (bits >> 15)


def characteristic(x_BS: Tensor, knots_K: Tensor) -> Tensor:
    """Sum over images of exp(i t x), real and imaginary part, (2, S, K)."""
    angle_BSK = x_BS[..., None] * knots_K
    return torch.stack([angle_BSK.cos().sum(0), angle_BSK.sin().sum(0)])


def quadrature(knots_K: Tensor) -> Tensor:
    """The trapezoidal rule's weights over -last to last for an even function that is 0 at 0."""
    # By index on the device: a tensor made of Python's numbers would be copied from the host at every step.
    is_last_K = torch.arange(KNOTS, device=knots_K.device) == KNOTS - 1
    return (LAST_KNOT / KNOTS) * (2 - is_last_K.to(knots_K.dtype))


def weights(dim: int, views: int, *, sigreg_weight: Weight = "auto", **others: object) -> dict[str, float]:
    """The weight as a number."""
    return {"sigreg_weight": LAMBDA if sigreg_weight == "auto" else float(sigreg_weight)}


def collapse_risk(dim: int, views: int, *, sigreg_weight: Weight = "auto", **others: object) -> str | None:
    """One sentence when the weight is under a tenth of the authors', else None."""
    weight = weights(dim, views, sigreg_weight=sigreg_weight)["sigreg_weight"]
    if weight * RISK_FACTOR >= LAMBDA:
        return None
    return (
        f"loss.sigreg_weight {weight:g} is less than a tenth of the authors' {LAMBDA:g}: "
        "embeddings are likely to collapse; set it to auto."
    )


LOSS = Loss("sigreg", "SIGReg (LeJEPA)", sigreg, ("invariance", "sigreg"), weights, collapse_risk, is_seeded=True)
