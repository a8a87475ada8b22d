"""Slow, obviously right formulas: loops over views, images and dimensions, as the papers write them.

z_VBD is a float64 tensor of V views, B images, D dimensions; results are 0-dim tensors autograd can follow.
"""

import torch
from torch import Tensor

from fastssl.losses.sigreg import directions

SEED = 3  # of a loss that draws directions


def standardize_per_view(z_VBD: Tensor) -> list[list[Tensor]]:
    """[v][i] -> column of B values with mean 0 and biased variance 1 (eps 1e-5 under the root)."""
    return [[_standard(z[:, i], z[:, i]) for i in range(z.shape[1])] for z in z_VBD]


def standardize_joint(z_VBD: Tensor) -> list[list[Tensor]]:
    """As above with one mean and variance for all views."""
    return [[_standard(z[:, i], z_VBD[:, :, i].flatten()) for i in range(z.shape[1])] for z in z_VBD]


def _standard(column: Tensor, population: Tensor) -> Tensor:
    mean = sum(population) / len(population)
    variance = sum((x - mean) ** 2 for x in population) / len(population)
    return (column - mean) / (variance + 1e-5) ** 0.5


def to_sphere(z_VBD: Tensor) -> Tensor:
    """Each embedding scaled to length sqrt(D), eps 1e-12 under the root."""
    D = z_VBD.shape[2]
    return torch.stack([torch.stack([z / ((z * z).sum() / D + 1e-12) ** 0.5 for z in view]) for view in z_VBD])


def correlation(a: list[Tensor], b: list[Tensor], i: int, j: int) -> Tensor:
    """C_ij of two views given as lists of columns."""
    return sum(x * y for x, y in zip(a[i], b[j], strict=True)) / len(a[i])


def barlow_two_views(z_VBD: Tensor, weight: float) -> Tensor:
    """The first paper's loss for exactly two views."""
    one, two = standardize_per_view(z_VBD)
    D, total = len(one), torch.zeros((), dtype=z_VBD.dtype)
    for i in range(D):
        for j in range(D):
            c = correlation(one, two, i, j)
            total = total + ((c - 1) ** 2 if i == j else weight * c**2)
    return total


def barlow_leave_one_out(columns: list[list[Tensor]], weight: float) -> Tensor:
    """All ordered pairs: C^v is the mean over w != v of the pairwise correlations; the loss their mean."""
    V, D = len(columns), len(columns[0])
    total = torch.zeros((), dtype=torch.float64)
    for v in range(V):
        for i in range(D):
            for j in range(D):
                c = sum(correlation(columns[v], columns[w], i, j) for w in range(V) if w != v) / (V - 1)
                total = total + ((c - 1) ** 2 if i == j else weight * c**2) / V
    return total


def barlow_authors(columns: list[list[Tensor]], weight: float) -> Tensor:
    """All V^2 pairs: redundancy of their mean correlation, invariance against the mean of all views."""
    V, D = len(columns), len(columns[0])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(D):
        for v in range(V):
            c = sum(correlation(columns[v], columns[w], i, i) for w in range(V)) / V
            total = total + (c - 1) ** 2 / V
        for j in range(D):
            if i != j:
                pairs = [correlation(columns[v], columns[w], i, j) for v in range(V) for w in range(V)]
                total = total + weight * (sum(pairs) / V**2) ** 2
    return total


def vicreg(z_VBD: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """The paper's loss, each view against the mean of the others, covariance as two views' worth."""
    V, B, D = z_VBD.shape
    near, hinge, off = (torch.zeros((), dtype=z_VBD.dtype) for _ in range(3))
    for v in range(V):
        others = sum(z_VBD[w] for w in range(V) if w != v) / (V - 1)
        centered = [z_VBD[v][:, i] - sum(z_VBD[v][:, i]) / B for i in range(D)]
        for i in range(D):
            near = near + sum((z_VBD[v][b, i] - others[b, i]) ** 2 for b in range(B)) / (V * B * D)
            spread = (sum(x * x for x in centered[i]) / (B - 1) + 1e-4) ** 0.5
            hinge = hinge + max(1 - spread, 0 * spread) / (V * D)
            for j in range(D):
                if i != j:
                    cov = sum(x * y for x, y in zip(centered[i], centered[j], strict=True)) / (B - 1)
                    off = off + 2 / V * cov**2 / D
    return invariance * near + variance * hinge + covariance * off


def vicreg_authors(z_VBD: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """The two-view loss of each view and the mean of the others, averaged over views."""
    V = len(z_VBD)
    pairs = (torch.stack([z_VBD[v], sum(z_VBD[w] for w in range(V) if w != v) / (V - 1)]) for v in range(V))
    return sum(vicreg(pair, invariance, variance, covariance) for pair in pairs) / V


def sigreg(z_VBD: Tensor, weight: float, directions_DS: Tensor) -> Tensor:
    """Image by image to the mean of the views; every view and direction to a Gaussian, by complex numbers, -3 to 3."""
    V, B, D = z_VBD.shape
    means = [sum(z_VBD[v][b] for v in range(V)) / V for b in range(B)]
    near = sum(((z_VBD[v][b] - means[b]) ** 2).sum() for v in range(V) for b in range(B)) / (V * B * D)
    t = torch.linspace(-3, 3, 33, dtype=z_VBD.dtype)
    gauss = torch.exp(-(t**2) / 2)
    far = torch.zeros((), dtype=z_VBD.dtype)
    for v in range(V):
        for a in directions_DS.T:
            apart = torch.exp(1j * t * (z_VBD[v] @ a)[:, None]).mean(0) - gauss
            integral = torch.trapezoid((apart.real**2 + apart.imag**2) * gauss, t)
            far = far + B * integral / (V * directions_DS.shape[1])
    return (1 - weight) * near + weight * far


def barlow_authors_code(z_VBD: Tensor, weight: float) -> Tensor:
    """As arXiv 2312.10725's code has it: unit length, one unbiased deviation of all views, no epsilon; view by view."""
    V, B, _ = z_VBD.shape
    z_VBD = torch.nn.functional.normalize(z_VBD, dim=-1)
    flat = z_VBD.flatten(0, 1)
    z_VBD = (z_VBD - flat.mean(0)) / flat.std(0)
    mean = sum(z_VBD) / V
    on_diagonal = sum(((torch.diagonal(z.T @ mean) / B - 1) ** 2).sum() for z in z_VBD) / V
    c = sum(z.T @ mean for z in z_VBD) / (V * B)
    return on_diagonal + weight * (c - c.diagonal().diag()).pow(2).sum()


LOSSES = {  # every row of fastssl's table of losses, as (z_VBD, its weights) to the loss
    "barlow_twins": lambda z_VBD, *, redundancy_weight: barlow_leave_one_out(
        standardize_per_view(z_VBD), redundancy_weight
    ),
    "vicreg": lambda z_VBD, *, invariance_weight, variance_weight, covariance_weight: vicreg(
        z_VBD, invariance_weight, variance_weight, covariance_weight
    ),
    "sigreg": lambda z_VBD, *, sigreg_weight: sigreg(
        z_VBD, sigreg_weight, directions(z_VBD.shape[2], 256, seed=SEED, like=z_VBD)
    ),
}


def knn(train, labels, test, k: int, temperature: float) -> list[int]:
    """Weighted vote of the k nearest by cosine of centered rows, one test row at a time, with lists."""
    mean = [sum(column) / len(train) for column in zip(*train, strict=True)]
    unit = [_unit(row, mean) for row in train]
    answers = []
    for row in test:
        seen = _unit(row, mean)
        near = sorted(
            ((sum(a * b for a, b in zip(seen, u, strict=True)), y) for u, y in zip(unit, labels, strict=True))
        )
        votes: dict[int, float] = {}
        for cosine, label in near[-k:]:
            votes[label] = votes.get(label, 0.0) + torch.tensor(cosine / temperature).exp().item()
        answers.append(max(votes, key=lambda y: votes[y]))
    return answers


def _unit(row, mean) -> list[float]:
    centered = [x - m for x, m in zip(row, mean, strict=True)]
    length = sum(x * x for x in centered) ** 0.5
    return [x / length for x in centered]
