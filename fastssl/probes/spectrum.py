"""What the features look like from inside: their eigenspectrum and figures drawn from it, in float64.

Features are centered first. The power-law exponent is a weighted log-log fit over ranks 4 to 50 (weight
1 / rank, so that each octave counts alike); RankMe is arXiv 2210.02885's formula, of the centered features and, as
there, of the features as they are.

N images, F features, V views.
"""

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fastssl.errors import UserError

ALPHA_FIRST_RANK, ALPHA_LAST_RANK = 4, 50
DEAD_BELOW = 1e-3
ROUNDING = 1e-6
CHUNK_ROWS = 4096
# Between the good and the failed runs of docs/evaluation.md, "Judging a run without labels".
SAME, CORRELATED, FEW_DIRECTIONS, VARIANT, SETTLED = 0.7, 0.4, 3.0, 0.75, 0.5


class Features:
    """Features with what several figures need, computed once.

    Args:
        features_NF: any float dtype.
        views_VNF: features of V >= 2 views of the same images, or None.
    """

    def __init__(self, features_NF: Tensor, views_VNF: Tensor | None = None) -> None:
        self.features_NF, self.views_VNF = features_NF, views_VNF

    @cached_property
    def covariance_FF(self) -> Tensor:
        """Float64, biased."""
        return _covariance(self.features_NF)

    @cached_property
    def values_F(self) -> Tensor:
        """Eigenvalues, float64, largest first, none negative."""
        return _descending(self.covariance_FF)

    @cached_property
    def moments_FF(self) -> Tensor:
        """Second moments, not centered, float64."""
        mean_F = self.features_NF.to(self.covariance_FF.device).double().mean(0)
        return self.covariance_FF + mean_F.outer(mean_F)

    @cached_property
    def live_F(self) -> Tensor:
        """Dimensions whose spread is at least a thousandth of the typical (root mean square) one."""
        variance_F = self.covariance_FF.diagonal()
        return variance_F > DEAD_BELOW**2 * variance_F.mean()


def eigenspectrum(features_NF: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the features (biased), float64 (F,), largest first, none negative."""
    return _descending(_covariance(features_NF))


def alpha(
    values_F: Tensor, *, first: int = ALPHA_FIRST_RANK, last: int = ALPHA_LAST_RANK
) -> tuple[float, float] | None:
    """(alpha, R^2) of values ~ rank^-alpha over ranks first..last, or None below three usable ranks.

    Args:
        values_F: eigenvalues, largest first.
        first: rank, from 1; included. Ranks at rounding error of the largest are left out.
        last: rank, included.
    """
    floor = values_F[0] * torch.finfo(values_F.dtype).eps * len(values_F)
    usable = values_F[first - 1 : last]
    usable = usable[usable > floor]
    if len(usable) < 3:
        return None
    rank = torch.arange(first, first + len(usable), dtype=torch.float64, device=values_F.device)
    weight, x, y = 1 / rank / (1 / rank).sum(), rank.log(), usable.log()
    dx, dy = x - (weight * x).sum(), y - (weight * y).sum()
    slope = (weight * dx * dy).sum() / (weight * dx * dx).sum()
    spread = (weight * dy * dy).sum()
    left = (weight * (dy - slope * dx).square()).sum()
    return float(-slope), float(1 - left / spread) if spread > 0 else 1.0


def rankme(values_F: Tensor) -> float:
    """exp(entropy of the singular values divided by their sum): how many directions are in use."""
    singular = values_F.sqrt()
    if float(singular.sum()) == 0:
        return 0.0
    share = singular / singular.sum()
    return math.exp(float(-torch.xlogy(share, share).sum()))


def participation_ratio(values_F: Tensor) -> float:
    """(sum of eigenvalues)^2 / sum of their squares."""
    total = float(values_F.sum())
    return total**2 / float(values_F.square().sum()) if total > 0 else 0.0


def orthogonality_residual(features_NF: Tensor) -> float:
    """Mean absolute correlation of two different dimensions, dead ones left out; 0 to 1."""
    return mean_correlation(Features(features_NF))


def mean_correlation(features: Features) -> float:
    """`orthogonality_residual` of features whose covariance is known."""
    live_F = features.live_F
    covariance_LL = features.covariance_FF[live_F][:, live_F]
    live = len(covariance_LL)
    if live < 2:
        return 0.0
    scale_L = covariance_LL.diagonal().rsqrt()
    correlation = (covariance_LL * scale_L * scale_L[:, None]).abs()
    return float((correlation.sum() - correlation.diagonal().sum()) / (live * (live - 1)))


def invariance_of(features: Features) -> float | None:
    """`invariance_residual` of the views, None without them."""
    return None if features.views_VNF is None else invariance_residual(features.views_VNF)


def alpha_fit(features: Features, *, part: int) -> float | None:
    """The exponent (part 0) or R^2 (part 1) of `alpha`; None when the spectrum has too few ranks."""
    fit = alpha(features.values_F)
    return None if fit is None else fit[part]


def rank_of(features: Features) -> float:
    return rankme(features.values_F)


def uncentered_rank_of(features: Features) -> float:
    return rankme(_descending(features.moments_FF))


def participation_of(features: Features) -> float:
    return participation_ratio(features.values_F)


def dims(features: Features) -> float:
    """F."""
    return float(features.features_NF.shape[1])


def count(features: Features) -> float:
    """N."""
    return float(len(features.features_NF))


def dead_dims(features: Features) -> float:
    """How many dimensions do not vary."""
    return float((~features.live_F).sum())


def invariance_residual(views_VNF: Tensor) -> float:
    """Variance among views of one image over the variance of all: 0 views agree, about 1 they are unrelated."""
    views_VNF = with_float64(views_VNF).double()
    within = views_VNF.var(0, correction=1).sum(1).mean()
    total = (views_VNF - views_VNF.mean((0, 1))).square().sum(2).mean()
    return float(within / total) if total > 0 else 0.0


def collapse_warnings(figures: Mapping[str, float], *, done: float = 1.0) -> dict[str, str]:
    """What is wrong with features of such figures and what to change, by kind; empty when nothing is.

    Args:
        figures: `table.figures` of a backbone's features.
        done: share of the training that is done, (0, 1]; figures that need time are not judged before
            SETTLED of it.
    """
    dims, dead, rank = figures["dims"], figures["dead_dims"], figures["rankme"]
    if dead >= dims:
        return {
            "constant": f"All {dims:.0f} features are constant: the run has collapsed. "
            "Set the weights under loss to auto, or lower optim.lr, and start again."
        }
    most = min(dims, figures.get("spectrum_images", float("inf")) - 1)  # that so many centered images can span
    if rank < max(2.0, most / 100):
        return {
            "few directions": f"The {dims:.0f} features span only about {rank:.1f} directions: the run is collapsing. "
            "Set the weights under loss to auto; if they are, lower optim.lr."
        }
    warnings = {}
    if dead > dims / 2:
        warnings["dead"] = (
            f"{dead:.0f} of {dims:.0f} features are constant. "
            "Lower optim.lr or optim.weight_decay, or use a narrower network."
        )
    correlation, participation = figures["orthogonality_residual"], figures["participation_ratio"]
    if correlation > SAME:
        warnings["same"] = (
            f"Features repeat each other (mean correlation {correlation:.2f}). "
            "Set the weights under loss to auto; if they are, see docs/choosing.md."
        )
    elif done >= SETTLED and participation < FEW_DIRECTIONS and correlation > CORRELATED:
        warnings["narrow"] = (
            f"A few directions carry nearly everything (participation ratio {participation:.1f}, orthogonality "
            f"residual {correlation:.2f}), as in a network that has not learned. Set the weights under loss to auto; "
            "if they are, train longer, or widen the last layer of model.projector."
        )
    variant = figures.get("invariance_residual", 0.0)
    if done >= SETTLED and variant > VARIANT:
        warnings["variant"] = (
            f"Two views of an image differ nearly as much as two images (invariance residual {variant:.2f}). "
            "Set the weights under loss to auto; if they are, raise optim.lr, train longer or weaken the views."
        )
    return warnings


def with_float64(x: Tensor) -> Tensor:
    """The tensor where there is float64: MPS has none."""
    return x.cpu() if x.device.type == "mps" else x


def _covariance(features_NF: Tensor) -> Tensor:
    features_NF = with_float64(features_NF)
    N, F = features_NF.shape
    if not N or not F:
        raise UserError(f"There are {N} features of {F} dimensions.", "Give at least one image and one dimension.")
    if not bool(features_NF.isfinite().all()):
        raise UserError("The features are not all finite.", "Evaluate an earlier checkpoint; this one diverged.")
    mean_F = features_NF.double().mean(0)
    total_FF = torch.zeros(F, F, dtype=torch.float64, device=features_NF.device)
    for rows in torch.split(features_NF, CHUNK_ROWS):
        centered = rows.double() - mean_F
        total_FF.addmm_(centered.T, centered)
    # A constant of 0.3 has a variance of 1e-17 or so by rounding: that is no spread.
    constant_F = total_FF.diagonal() / N <= (ROUNDING * mean_F).square()
    total_FF[constant_F], total_FF[:, constant_F] = 0, 0
    return total_FF / N


def _descending(covariance_FF: Tensor) -> Tensor:
    values_F: Tensor = torch.linalg.eigvalsh(covariance_FF)
    return values_F.flip(0).clamp_min(0)
