"""What the features look like from inside: their eigenspectrum and figures drawn from it, in float64.

Features are centered first. The power-law exponent is a weighted log-log fit over ranks 4 to 50 (weight
1 / rank, so that each octave counts alike); RankMe is arXiv 2210.02885's, of the centered features.

N images, F features, V views.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ALPHA_FIRST_RANK, ALPHA_LAST_RANK = 4, 50
DEAD_BELOW = 1e-3
ROUNDING = 1e-6
CHUNK_ROWS = 4096


def figures(features_NF: Tensor, *, views_VNF: Tensor | None = None) -> dict[str, float]:
    """All figures of one set of features.

    Args:
        features_NF: any float dtype.
        views_VNF: features of V >= 2 views of the same images, for the invariance residual.

    Returns:
        dims; alpha and alpha_r2 (left out when the spectrum has too few ranks); rankme and
        participation_ratio (1 to F); orthogonality_residual (0 to 1, mean absolute correlation of two
        dimensions); dead_dims (count); invariance_residual (0 views agree, 1 views are unrelated).
    """
    covariance_FF = _covariance(features_NF)
    values_F = _descending(covariance_FF)
    found = {"dims": float(features_NF.shape[1])}
    if (fit := alpha(values_F)) is not None:
        found |= {"alpha": fit[0], "alpha_r2": fit[1]}
    found |= {"rankme": rankme(values_F), "participation_ratio": participation_ratio(values_F)}
    live_F = _live(covariance_FF)
    found["orthogonality_residual"] = _orthogonality_residual(covariance_FF[live_F][:, live_F])
    found["dead_dims"] = float((~live_F).sum())
    if views_VNF is not None:
        found["invariance_residual"] = invariance_residual(views_VNF)
    return found


def eigenspectrum(features_NF: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the features (biased), float64 (F,), largest first, none negative."""
    return _descending(_covariance(features_NF))


def alpha(
    values_F: Tensor, *, first: int = ALPHA_FIRST_RANK, last: int = ALPHA_LAST_RANK
) -> tuple[float, float] | None:
    """(alpha, R^2) of values ~ rank^-alpha over ranks first..last, or None below three usable ranks.

    Args:
        values_F: eigenvalues, largest first.
        first, last: ranks from 1, both included; ranks at rounding error of the largest are left out.
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
    """Mean absolute correlation of two different dimensions, dead ones left out."""
    covariance_FF = _covariance(features_NF)
    live_F = _live(covariance_FF)
    return _orthogonality_residual(covariance_FF[live_F][:, live_F])


def invariance_residual(views_VNF: Tensor) -> float:
    """Variance among views of one image over the variance of all: 0 views agree, about 1 they are unrelated."""
    views_VNF = views_VNF.double()
    within = views_VNF.var(0, correction=1).sum(1).mean()
    total = (views_VNF - views_VNF.mean((0, 1))).square().sum(2).mean()
    return float(within / total) if total > 0 else 0.0


def collapse_warning(found: Mapping[str, float]) -> str | None:
    """What is wrong with these `figures` and what to change, in plain words, or None when nothing is."""
    dims, dead, rank = found["dims"], found["dead_dims"], found["rankme"]
    if dead >= dims:
        return (
            f"All {dims:.0f} features are constant: the run has collapsed. "
            "Set the weights under loss to auto, or lower optim.lr, and start again."
        )
    if rank < max(2.0, dims / 100):
        return (
            f"The {dims:.0f} features span only about {rank:.1f} directions: the run is collapsing. "
            "Set the weights under loss to auto; if they are, lower optim.lr."
        )
    if dead > dims / 2:
        return (
            f"{dead:.0f} of {dims:.0f} features are constant. "
            "Lower optim.lr or optim.weight_decay, or use a narrower network."
        )
    if found["orthogonality_residual"] > 0.7:
        return (
            f"Features repeat each other (mean correlation {found['orthogonality_residual']:.2f}). "
            "Set the weights under loss to auto; if they are, see docs/choosing.md."
        )
    return None


def _covariance(features_NF: Tensor) -> Tensor:
    if features_NF.device.type == "mps":  # no float64 there
        features_NF = features_NF.cpu()
    N, F = features_NF.shape
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


def _live(covariance_FF: Tensor) -> Tensor:
    """Dimensions whose spread is at least a thousandth of the typical (root mean square) one."""
    variance_F = covariance_FF.diagonal()
    return variance_F > DEAD_BELOW**2 * variance_F.mean()


def _orthogonality_residual(covariance_LL: Tensor) -> float:
    live = len(covariance_LL)
    if live < 2:
        return 0.0
    scale_L = covariance_LL.diagonal().rsqrt()
    correlation = (covariance_LL * scale_L * scale_L[:, None]).abs()
    return float((correlation.sum() - correlation.diagonal().sum()) / (live * (live - 1)))
