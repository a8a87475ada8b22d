"""Barlow Twins and VICReg for any number of views, as pure functions of the embeddings.

Every view is compared with the mean of the others: time and memory grow linearly in V, and V = 2 is the
two-view formula of the papers (arXiv 2103.03230, 2105.04906) exactly. Sums over ranks are an argument.

V views, B images on this rank, N images over all ranks, D dimensions. Terms are float32 whatever autocast
says (float64 stays float64); "loss" carries the gradient, the other terms are detached.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastssl.errors import UserError

AllSum = Callable[[Tensor], Tensor]
Views = list[Tensor]  # groups of whole views, each (v, B, D), together V of them

STANDARDISE_EPS = 1e-5
VICREG_EPS = 1e-4
# Fits to the authors' best weights for D = 64 ... 8192 (arXiv 2312.10725); tests/losses/test_losses.py repeats both.
BARLOW_C = 3.34
VICREG_FLOOR, VICREG_C = 22.4, 22.0
RISK_FACTOR = 10.0
# 4 MB in float32: larger tensors miss the cache, and above 32 MB malloc maps and zeroes new pages each time.
PIECE = 1 << 20


def identity(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


def barlow_twins(
    z_VBD: Tensor,
    *,
    orthogonality: float,
    form: Literal["leave_one_out", "authors"],
    standardise: Literal["per_view", "joint"],
    l2_normalise: bool,
    all_sum: AllSum = identity,
) -> dict[str, Tensor]:
    """Pull the diagonal of the views' cross-correlation to one, push the rest to zero.

    leave_one_out: C^v = z^v' mean_{w != v} z^w / N; sums over i and i != j, averaged over v.
    authors: the diagonal is against the mean m of all views and the rest is m' m / N, so the first term is
    ((V - 1) / V)^2 of leave_one_out's, and the weight must be chosen anew for each V.

    Args:
        z_VBD: embeddings, any float dtype, V >= 2.
        orthogonality: weight of the redundancy term, >= 0 (lambda; `orthogonality_rule` gives one).
        form: what each view is compared with.
        standardise: mean and variance of each view by itself, or of all views together.
        l2_normalise: first scale each embedding to length sqrt(D).
        all_sum: autograd-aware sum over ranks, `distributed.all_sum` under data parallelism.

    Returns:
        loss, invariance, redundancy: scalars, loss = invariance + orthogonality * redundancy.
    """
    _check(z_VBD)
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = _full_precision(z_VBD)
        count = all_sum(z_VBD.new_full((), z_VBD.shape[1]))
        if l2_normalise:
            z_VBD = _to_sphere(z_VBD)
        views = _standardise(_pieces(z_VBD), count, joint=standardise == "joint", all_sum=all_sum)
        if form == "leave_one_out":
            targets = _mean_of_others(views)
            redundancy = _off_diagonal_energy(views, targets, count, all_sum) / len(z_VBD)
        else:
            mean_1BD = _total(views) / len(z_VBD)
            targets = [mean_1BD] * len(views)
            redundancy = _off_diagonal_energy([mean_1BD], [mean_1BD], count, all_sum)
        invariance = (_diagonal(views, targets, count, all_sum) - 1).square().sum() / len(z_VBD)
        loss = invariance + orthogonality * redundancy
    return {"loss": loss, "invariance": invariance.detach(), "redundancy": redundancy.detach()}


def vicreg(
    z_VBD: Tensor, *, invariance: float, variance: float, covariance: float, all_sum: AllSum = identity
) -> dict[str, Tensor]:
    """Keep views together, every dimension's spread at one or more, and dimensions uncorrelated.

    Invariance is the mean over views of the mean squared distance to the mean of the others; variance the
    mean over views of the hinge; covariance twice the mean over views, which is the paper's sum for V = 2
    and keeps one set of weights good for every V.

    Args:
        z_VBD: embeddings, any float dtype, V >= 2.
        invariance, variance, covariance: weights >= 0 (25, 25, 1 in the paper).
        all_sum: autograd-aware sum over ranks, `distributed.all_sum` under data parallelism.

    Returns:
        loss, and the three terms before weighting.
    """
    _check(z_VBD)
    V, _, D = z_VBD.shape
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = _full_precision(z_VBD)
        count = all_sum(z_VBD.new_full((), z_VBD.shape[1]))
        free = (count - 1).clamp_min(1)
        views = _pieces(z_VBD)
        apart = [(z - m).square().sum() for z, m in zip(views, _mean_of_others(views), strict=True)]
        near = all_sum(sum(apart, z_VBD.new_zeros(()))) / (V * count * D)
        centred = _centre(views, count, joint=False, all_sum=all_sum)
        spread_VD = (all_sum(_sum_of_squares(centred)) / free + VICREG_EPS).sqrt()
        hinge = torch.relu(1 - spread_VD).mean()
        decorrelation = 2 * _off_diagonal_energy(centred, centred, free, all_sum) / (V * D)
        loss = invariance * near + variance * hinge + covariance * decorrelation
    terms = {"invariance": near, "variance": hinge, "covariance": decorrelation}
    return {"loss": loss} | {name: term.detach() for name, term in terms.items()}


def orthogonality_rule(
    loss: Literal["barlow_twins", "vicreg"], dim: int, views: int, *, form: str = "leave_one_out"
) -> float:
    """The weight `loss.orthogonality: auto` stands for; smaller projectors need stronger orthogonality.

    Barlow Twins: lambda = 3.34 / D, the geometric mean of lambda * D over the authors' table (a free fit has
    slope -1.05); with their multi-view form times ((V - 1) / V)^2, as its first term shrinks by that much.
    VICReg: the weight of invariance and variance when covariance has 1, max(22.4, D / 22), within 2.2 times
    of every entry of the authors' table; a larger value is weaker orthogonality. Neither depends on V
    otherwise, since the terms are means over views.

    Args:
        loss: which loss.
        dim: D, width of the embeddings, >= 1.
        views: V >= 2.
        form: Barlow Twins' form.
    """
    if loss == "vicreg":
        return max(VICREG_FLOOR, dim / VICREG_C)
    shrink = ((views - 1) / views) ** 2 if form == "authors" else 1.0
    return BARLOW_C / dim * shrink


def collapse_risk(
    loss: Literal["barlow_twins", "vicreg"],
    weight: float,
    dim: int,
    views: int,
    *,
    form: str = "leave_one_out",
) -> str | None:
    """One plain sentence when orthogonality is over ten times the rule's, else None.

    Args:
        loss, dim, views, form: as for `orthogonality_rule`.
        weight: Barlow Twins' lambda, or VICReg's invariance weight divided by its covariance weight.
    """
    rule = orthogonality_rule(loss, dim, views, form=form)
    excess = weight / rule if loss == "barlow_twins" else rule / max(weight, 1e-12)
    if excess <= RISK_FACTOR:
        return None
    kind = "orthogonality" if loss == "barlow_twins" else "invariance and variance weight"
    side = "above" if loss == "barlow_twins" else "below"
    return (
        f"{kind} {weight:g} is {excess:.0f} times {side} the rule's {rule:.3g} for D = {dim}: "
        "embeddings are likely to collapse; set loss.orthogonality to auto."
    )


def _check(z_VBD: Tensor) -> None:
    if z_VBD.ndim != 3 or z_VBD.shape[0] < 2:
        raise UserError(
            f"The loss compares views, but the embeddings have shape {tuple(z_VBD.shape)}.",
            "Pass (V, B, D) with at least V = 2 views of each image.",
        )


def _full_precision(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _to_sphere(z_VBD: Tensor) -> Tensor:
    # Length sqrt(D), not 1: unit length makes variances 1 / D, and at D = 8192 eps would be 8 % of that.
    return z_VBD * (z_VBD.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def _pieces(z_VBD: Tensor) -> Views:
    """The views in groups of about PIECE elements: what follows runs group by group."""
    return list(torch.split(z_VBD, max(1, PIECE // max(1, z_VBD[0].numel()))))


def _total(views: Views) -> Tensor:
    """Sum over all V views, (1, B, D)."""
    total_1BD = views[0].sum(0, keepdim=True)
    for z in views[1:]:
        total_1BD = total_1BD + z.sum(0, keepdim=True)
    return total_1BD


def _mean_of_others(views: Views) -> Views:
    """The mean of all views but one, for each: a sum and differences, so linear in V."""
    total_1BD, V = _total(views), sum(map(len, views))
    return [(total_1BD - z) / (V - 1) for z in views]


def _centre(views: Views, count: Tensor, *, joint: bool, all_sum: AllSum) -> Views:
    mean_V1D = all_sum(torch.cat([z.sum(1, keepdim=True) for z in views])) / count
    if joint:
        mean_V1D = mean_V1D.mean(0, keepdim=True).expand_as(mean_V1D)
    means = torch.split(mean_V1D, [len(z) for z in views])
    return [z - m for z, m in zip(views, means, strict=True)]


def _sum_of_squares(views: Views) -> Tensor:
    """(V, D): sum over this rank's images."""
    return torch.cat([z.square().sum(1) for z in views])


def _standardise(views: Views, count: Tensor, *, joint: bool, all_sum: AllSum) -> Views:
    centred = _centre(views, count, joint=joint, all_sum=all_sum)
    variance_VD = all_sum(_sum_of_squares(centred)) / count
    if joint:
        variance_VD = variance_VD.mean(0, keepdim=True).expand_as(variance_VD)
    scales = torch.split((variance_VD + STANDARDISE_EPS).rsqrt()[:, None], [len(z) for z in views])
    return [z * s for z, s in zip(centred, scales, strict=True)]


def _diagonal(left: Views, right: Views, count: Tensor, all_sum: AllSum) -> Tensor:
    """(left_v' right_v / count)_ii, (V, D)."""
    return all_sum(torch.cat([(a * b).sum(1) for a, b in zip(left, right, strict=True)])) / count


def _off_diagonal_energy(left: Views, right: Views, count: Tensor, all_sum: AllSum) -> Tensor:
    """sum_v sum_{i != j} (left_v' right_v / count)_ij^2."""
    energies = [_energy(a, b, all_sum) for a, b in zip(left, right, strict=True)]
    diagonal_VD = _diagonal(left, right, count, all_sum)
    return torch.stack(energies).sum() / count.square() - diagonal_VD.square().sum()


def _energy(left_VBD: Tensor, right_VBD: Tensor, all_sum: AllSum) -> Tensor:
    """sum_v ||left_v' right_v||^2 over all ranks, by whichever product is smaller, D x D or B x B."""
    _, B, D = left_VBD.shape
    if all_sum is not identity or D <= B:
        return all_sum(left_VBD.mT @ right_VBD).square().sum()
    # ||X'Y||^2 = <XX', YY'>: at B = 256, D = 8192 that is 16 times fewer multiplications and no D x D matrix.
    left_VBB = left_VBD @ left_VBD.mT
    right_VBB = left_VBB if right_VBD is left_VBD else right_VBD @ right_VBD.mT
    return (left_VBB * right_VBB).sum()
