"""What every loss here is made of: statistics of embeddings, view by view, with sums over ranks as an argument.

V views, B images on this rank, N images over all ranks, D dimensions. Time and memory are linear in V.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.errors import UserError

AllSum = Callable[[Tensor], Tensor]
Views = list[Tensor]  # groups of whole views, each (v, B, D), together V of them

STANDARDIZE_EPS = 1e-5
# 4 MB in float32: larger tensors miss the cache, and above 32 MB malloc maps and zeroes new pages each time.
PIECE = 1 << 20
# Elements below which a sum over ranks costs its latency alone, so that several travel as one.
SMALL = 1 << 20


def identity(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


def joined(tensors: list[Tensor], all_sum: AllSum) -> list[Tensor]:
    """The sum over ranks of each, the small ones, of which there are some, in one round trip."""
    # On one rank nothing is copied into a flat tensor and back.
    if all_sum is identity:
        return tensors
    small = [x for x in tensors if x.numel() < SMALL]
    flat = all_sum(torch.cat([x.flatten() for x in small]))
    sums = iter(torch.split(flat, [x.numel() for x in small]))
    return [next(sums).view(x.shape) if x.numel() < SMALL else all_sum(x) for x in tensors]


def check_views(z_VBD: Tensor) -> None:
    if not isinstance(z_VBD, Tensor):
        raise UserError(
            f"The embeddings are a {type(z_VBD).__name__}, not a tensor.",
            "Pass one tensor (V, B, D): torch.stack of a list of views.",
        )
    if not z_VBD.is_floating_point():
        raise UserError(f"The embeddings are {str(z_VBD.dtype).removeprefix('torch.')}.", "Pass them as floats.")
    if z_VBD.ndim != 3 or z_VBD.shape[0] < 2 or z_VBD.shape[2] < 1:
        raise UserError(
            f"The loss compares views, but the embeddings have shape {tuple(z_VBD.shape)}.",
            "Pass (V, B, D) with at least V = 2 views of each image and D = 1 dimension.",
        )


def full_precision(z: Tensor) -> Tensor:
    # float64 stays what it is: numerical checks of the gradient need it.
    return z if z.dtype == torch.float64 else z.float()


def to_sphere(z_VBD: Tensor) -> Tensor:
    # Length sqrt(D), not 1: unit length makes variances 1 / D, and at D = 8192 eps would be 8 % of that.
    return z_VBD * (z_VBD.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def pieces(z_VBD: Tensor) -> Views:
    """The views in groups of about PIECE elements: what follows runs group by group."""
    return list(torch.split(z_VBD, max(1, PIECE // max(1, z_VBD[0].numel()))))


def total(views: Views) -> Tensor:
    """Sum over all V views, (1, B, D)."""
    total_1BD = views[0].sum(0, keepdim=True)
    for z in views[1:]:
        total_1BD = total_1BD + z.sum(0, keepdim=True)
    return total_1BD


def mean_of_others(views: Views) -> Views:
    """The mean of all views but one, for each: a sum and differences, so linear in V."""
    total_1BD, V = total(views), sum(map(len, views))
    return [(total_1BD - z) / (V - 1) for z in views]


def image_count(z_VBD: Tensor) -> Tensor:
    """B of this rank, a scalar on the embeddings' device."""
    # Filled on the device: a number copied from the host would be waited for.
    return z_VBD.new_full((), z_VBD.shape[1])


def sums_of_images(views: Views) -> Tensor:
    """(V, 1, D): sum over this rank's images."""
    return torch.cat([z.sum(1, keepdim=True) for z in views])


def center(views: Views, mean_V1D: Tensor, *, joint: bool = False) -> Views:
    if joint:
        # All views have the same number of images, so the mean of their means is the mean of all.
        mean_V1D = mean_V1D.mean(0, keepdim=True).expand_as(mean_V1D)
    means = torch.split(mean_V1D, [len(z) for z in views])
    return [z - m for z, m in zip(views, means, strict=True)]


def sum_of_squares(views: Views) -> Tensor:
    """(V, D): sum over this rank's images."""
    return torch.cat([z.square().sum(1) for z in views])


def standardize_views(centered: Views, count: Tensor, *, joint: bool, all_sum: AllSum) -> Views:
    # Biased, as in the batch norm that the paper's code standardizes by.
    variance_VD = all_sum(sum_of_squares(centered)) / count
    if joint:
        # Already about the joint mean, so the mean of the variances is the joint variance.
        variance_VD = variance_VD.mean(0, keepdim=True).expand_as(variance_VD)
    scales = torch.split((variance_VD + STANDARDIZE_EPS).rsqrt()[:, None], [len(z) for z in centered])
    return [z * s for z, s in zip(centered, scales, strict=True)]


def diagonal(left: Views, right: Views) -> Tensor:
    """(left_v' right_v)_ii of this rank, (V, D)."""
    return torch.cat([(a * b).sum(1) for a, b in zip(left, right, strict=True)])


def off_diagonal_energy(
    left: Views, right: Views, *others: tuple[Views, Views], count: Tensor, all_sum: AllSum
) -> list[Tensor]:
    """sum_v sum_{i != j} (left_v' right_v / count)_ij^2, then the diagonal (V, D) of each of the other pairs.

    On one rank the energy comes from whichever product is smaller, D x D or B x B.
    """
    _, B, D = left[0].shape
    # On several ranks the D x D sums have to meet before they are squared: B x B would miss pairs across ranks.
    is_small = all_sum is identity and D > B
    products = [squared_norm(a, b) if is_small else a.mT @ b for a, b in zip(left, right, strict=True)]
    sums = joined([*products, *(diagonal(a, b) for a, b in ((left, right), *others))], all_sum)
    energies = [x if is_small else x.square().sum() for x in sums[: len(products)]]
    diagonal_VD, *diagonals = (x / count for x in sums[len(products) :])
    # All entries less the diagonal: a mask would be one more D x D tensor.
    return [torch.stack(energies).sum() / count.square() - diagonal_VD.square().sum(), *diagonals]


def squared_norm(left_VBD: Tensor, right_VBD: Tensor) -> Tensor:
    """sum_v ||left_v' right_v||^2 without a D x D matrix."""
    # ||X'Y||^2 = <XX', YY'>: at B = 256, D = 8192 that is 16 times fewer multiplications.
    left_VBB = left_VBD @ left_VBD.mT
    right_VBB = left_VBB if right_VBD is left_VBD else right_VBD @ right_VBD.mT
    return (left_VBB * right_VBB).sum()
