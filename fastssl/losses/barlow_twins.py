"""Barlow Twins over any number of views (arXiv 2103.03230; views and scaled weight: arXiv 2312.10725).

Every view is compared with the mean of the others: time and memory grow linearly in V, and V = 2 is the two-view
formula of the paper exactly. V views, B images on this rank, N images over all ranks, D dimensions.
"""

from typing import Literal

import torch
from torch import Tensor

from fastssl.losses.loss import RISK_FACTOR, Form, Loss, Terms, Weight, check_choice, check_form, check_weights
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
    standardize_views,
    sums_of_images,
    to_sphere,
    total,
)

# The geometric mean of lambda * D over the authors' best weights for D = 64 ... 8192; tests/losses/test_losses.py
# repeats the fit.
C = 3.34


def barlow_twins(
    z_VBD: Tensor,
    *,
    redundancy_weight: Weight = "auto",
    form: Form = "leave_one_out",
    standardize: Literal["per_view", "joint"] = "per_view",
    l2_normalize: bool = False,
    all_sum: AllSum = identity,
) -> Terms:
    """Pull the diagonal of the views' cross-correlation to one, push the rest to zero.

    leave_one_out: C^v = z^v' mean_{w != v} z^w / N; sums over i and i != j, averaged over v.
    authors: the diagonal is against the mean m of all views and the rest is m' m / N, so the first term is
    ((V - 1) / V)^2 of leave_one_out's, and the weight must be chosen anew for each V.

    Args:
        z_VBD: embeddings (V, B, D), any float dtype, V >= 2. Terms are float32 whatever autocast says (float64 stays).
        redundancy_weight: of the off-diagonal term, >= 0 (the paper's lambda); "auto" is `redundancy_rule`.
        form: what each view is compared with.
        standardize: mean and variance of each view by itself, or of all views together.
        l2_normalize: first scale each embedding to length sqrt(D).
        all_sum: autograd-aware sum over ranks, `ranks.all_sum` under data parallelism.

    Returns:
        loss, invariance, redundancy: scalars, loss = invariance + redundancy_weight * redundancy; "loss" carries the
        gradient, the other terms are detached.

    Raises:
        UserError: when z_VBD is not (V, B, D) with V >= 2, or an argument has another value than named here.
    """
    check_views(z_VBD)
    check_form(form)
    check_choice("standardize", standardize, ("per_view", "joint"))
    check_weights(redundancy_weight=redundancy_weight)
    # Here too, so that the loss stands by itself, without a recipe.
    if redundancy_weight == "auto":
        redundancy_weight = redundancy_rule(z_VBD.shape[-1], len(z_VBD), form=form)
    # Autocast would form the products in half precision, and redundancy is a difference of two large sums.
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = full_precision(z_VBD)
        if l2_normalize:
            z_VBD = to_sphere(z_VBD)
        views, joint = pieces(z_VBD), standardize == "joint"
        # Counted over ranks: they may hold different numbers of images, and the number travels with the sums.
        count, sum_V1D = joined([image_count(z_VBD), sums_of_images(views)], all_sum)
        centered = center(views, sum_V1D / count, joint=joint)
        views = standardize_views(centered, count, joint=joint, all_sum=all_sum)
        if form == "leave_one_out":
            targets = mean_of_others(views)
            left, right = views, targets
        else:
            # C of the mean is the mean of all V^2 correlation matrices: V products become one.
            mean_1BD = total(views) / len(z_VBD)
            targets = [mean_1BD] * len(views)
            left = right = [mean_1BD]
        # The authors' diagonal is of another pair than their matrix: each view against the mean, not m' m.
        redundancy, diagonal_VD = off_diagonal_energy(left, right, (views, targets), count=count, all_sum=all_sum)
        if form == "leave_one_out":
            # The authors' form has a single matrix, already of the mean: nothing is left to average.
            redundancy = redundancy / len(z_VBD)
        invariance = (diagonal_VD - 1).square().sum() / len(z_VBD)
        loss = invariance + redundancy_weight * redundancy
    # Detached: whoever keeps a term for a log would keep the graph of the step.
    return {"loss": loss, "invariance": invariance.detach(), "redundancy": redundancy.detach()}


def redundancy_rule(dim: int, views: int, *, form: Form = "leave_one_out") -> float:
    """The weight that "auto" stands for, 3.34 / D: smaller projectors need a larger one.

    A free fit to the authors' table has slope -1.05. With their multi-view form it is times ((V - 1) / V)^2, as the
    first term shrinks by that much; otherwise it does not depend on V, since the terms are means over views.

    Args:
        dim: D, width of the embeddings, >= 1.
        views: V >= 2.
        form: of the loss.

    Raises:
        UserError: for none of the forms.
    """
    check_form(form)
    # Without it the authors' form would weigh redundancy (V / (V - 1))^2 times as much as the two-view fit.
    shrink = ((views - 1) / views) ** 2 if form == "authors" else 1.0
    return C / dim * shrink


def weights(
    dim: int, views: int, *, redundancy_weight: Weight = "auto", form: Form = "leave_one_out", **others: object
) -> dict[str, float]:
    """The weight as a number."""
    rule = redundancy_rule(dim, views, form=form)
    return {"redundancy_weight": rule if redundancy_weight == "auto" else float(redundancy_weight)}


def collapse_risk(
    dim: int, views: int, *, redundancy_weight: Weight = "auto", form: Form = "leave_one_out", **others: object
) -> str | None:
    """One sentence when the weight is over ten times the rule's, else None."""
    rule = redundancy_rule(dim, views, form=form)
    weight = weights(dim, views, redundancy_weight=redundancy_weight, form=form)["redundancy_weight"]
    # Only upwards: too large a weight collapses, too small a one leaves dimensions redundant.
    if weight / rule <= RISK_FACTOR:
        return None
    return (
        f"loss.redundancy_weight {weight:g} is {weight / rule:.0f} times the rule's {rule:.3g} for D = {dim}: "
        "embeddings are likely to collapse; set it to auto."
    )


LOSS = Loss("barlow_twins", "Barlow Twins", barlow_twins, ("invariance", "redundancy"), weights, collapse_risk)
