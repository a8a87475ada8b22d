"""VICReg over any number of views (arXiv 2105.04906; views and scaled weights: arXiv 2312.10725).

Every view is compared with the mean of the others: time and memory grow linearly in V, and V = 2 is the two-view
formula of the paper exactly. V views, B images on this rank, N images over all ranks, D dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from fastssl.losses.loss import RISK_FACTOR, Form, Loss, Terms, Weight, check_form, check_weights
from fastssl.losses.statistics import (
    AllSum,
    center,
    check_views,
    full_precision,
    identity,
    image_count,
    joined,
    mean_of_others,
    off_diagonal_energy,
    pieces,
    sum_of_squares,
    sums_of_images,
)

# Under the root, as in the paper: without it a dimension of no spread has an infinite gradient.
VARIANCE_EPS = 1e-4
# Within 2.2 times of each entry of the authors' table for D = 64 ... 8192; tests/losses/test_losses.py repeats the fit.
# A floor, because the authors' best weights hardly change for small D and grow with it after that.
FLOOR, C = 22.4, 22.0


def vicreg(
    z_VBD: Tensor,
    *,
    invariance_weight: Weight = "auto",
    variance_weight: Weight = "auto",
    covariance_weight: Weight = "auto",
    form: Form = "leave_one_out",
    all_sum: AllSum = identity,
) -> Terms:
    """Keep views together, every dimension's spread at one or more, and dimensions uncorrelated.

    Invariance is the mean over views of the mean squared distance to the mean of the others; variance the
    mean over views of the hinge; covariance twice the mean over views, which is the paper's sum for V = 2
    and keeps one set of weights good for every V.

    authors: variance and covariance are of each view and of the mean of its others alike, so that each view and that
    mean are a pair of the two-view formula. The same for V = 2; otherwise the mean of others, which spreads less than
    a view, is pushed apart too.

    Args:
        z_VBD: embeddings (V, B, D), any float dtype, V >= 2. Terms are float32 whatever autocast says (float64 stays).
        invariance_weight: >= 0 (25 in the paper); "auto" is `invariance_rule`.
        variance_weight: likewise.
        covariance_weight: >= 0; "auto" is 1, as in the paper.
        form: what variance and covariance are of.
        all_sum: autograd-aware sum over ranks, `ranks.all_sum` under data parallelism.

    Returns:
        loss, and the three terms before weighting; "loss" carries the gradient, the other terms are detached.

    Raises:
        UserError: when z_VBD is not (V, B, D) with V >= 2, or an argument has another value than named here.
    """
    check_views(z_VBD)
    check_form(form)
    check_weights(
        invariance_weight=invariance_weight, variance_weight=variance_weight, covariance_weight=covariance_weight
    )
    V, _, D = z_VBD.shape
    weight = weights(
        D,
        V,
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
    )
    # Autocast would form the products in half precision, and covariance is a difference of two large sums.
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = full_precision(z_VBD)
        views = pieces(z_VBD)
        # Before centering: views that differ by a shift are apart too.
        apart = [(z - m).square().sum() for z, m in zip(views, mean_of_others(views), strict=True)]
        # Counted over ranks: they may hold different numbers of images, and the number travels with the sums.
        own = [image_count(z_VBD), sum(apart, z_VBD.new_zeros(())), sums_of_images(views)]
        count, distance, sum_V1D = joined(own, all_sum)
        # Unbiased, as in the paper; a single image must not divide by zero.
        free = (count - 1).clamp_min(1)
        near = distance / (V * count * D)
        # About the mean over all ranks: each rank's own would hide how far the ranks are apart.
        centered = center(views, sum_V1D / count)
        if form == "authors":
            centered += mean_of_others(centered)
        spread_VD = (all_sum(sum_of_squares(centered)) / free + VARIANCE_EPS).sqrt()
        hinge = torch.relu(1 - spread_VD).mean()
        # The same list twice, by which the smaller product is formed once instead of twice.
        (energy,) = off_diagonal_energy(centered, centered, count=free, all_sum=all_sum)
        decorrelation = 2 * energy / (len(spread_VD) * D)
        loss = (
            weight["invariance_weight"] * near
            + weight["variance_weight"] * hinge
            + weight["covariance_weight"] * decorrelation
        )
    # Detached below: whoever keeps a term for a log would keep the graph of the step.
    terms = {"invariance": near, "variance": hinge, "covariance": decorrelation}
    return {"loss": loss} | {name: term.detach() for name, term in terms.items()}


def invariance_rule(dim: int) -> float:
    """The weight of invariance and variance that "auto" stands for while covariance has 1: max(22.4, D / 22).

    A larger value keeps dimensions apart less. It does not depend on V, since the terms are means over views.

    Args:
        dim: D, width of the embeddings, >= 1.
    """
    return max(FLOOR, dim / C)


def weights(
    dim: int,
    views: int,
    *,
    invariance_weight: Weight = "auto",
    variance_weight: Weight = "auto",
    covariance_weight: Weight = "auto",
    **others: object,
) -> dict[str, float]:
    """The weights as numbers."""
    # One rule for both, as the authors' table gives invariance and variance one weight.
    rule = invariance_rule(dim)
    return {
        "invariance_weight": rule if invariance_weight == "auto" else float(invariance_weight),
        "variance_weight": rule if variance_weight == "auto" else float(variance_weight),
        "covariance_weight": 1.0 if covariance_weight == "auto" else float(covariance_weight),
    }


def collapse_risk(dim: int, views: int, **settings: Any) -> str | None:
    """One sentence when invariance or variance weighs under a tenth of the rule's against covariance, else None."""
    rule, resolved = invariance_rule(dim), weights(dim, views, **settings)
    for name in ("invariance_weight", "variance_weight"):
        # Only the ratio to covariance counts; a weight of 0 must not divide by zero.
        share = resolved[name] / max(resolved["covariance_weight"], 1e-12)
        if rule / max(share, 1e-12) > RISK_FACTOR:
            return (
                f"loss.{name} {resolved[name]:g} is {rule / max(share, 1e-12):.0f} times below the rule's {rule:.3g} "
                f"for D = {dim}: embeddings are likely to collapse; set it to auto."
            )
    return None


LOSS = Loss("vicreg", "VICReg", vicreg, ("invariance", "variance", "covariance"), weights, collapse_risk)
