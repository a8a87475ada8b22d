"""Near-duplicates and outliers among features, by cosine similarity.

N images, F features, B rows of a block, P pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf

ROUNDING = 1e-6  # of a cosine, and of a mean relative to its rows
BLOCK = 1024  # rows compared with all others at a time: N x N is never held


def unit_rows(features_NF: Tensor) -> Tensor:
    """Rows centered and of length one, as the kNN probe compares them; float32 (N, F + 1).

    Rows that are the mean have no direction; the last column makes them like each other, and like nothing else.
    """
    features_NF = features_NF.float()
    centered_NF = features_NF - features_NF.mean(0, dtype=torch.float64).float()
    is_mean_N = centered_NF.norm(dim=1) <= ROUNDING * features_NF.norm(dim=1)
    unit_NF = nnf.normalize(centered_NF, dim=1) * ~is_mean_N[:, None]
    return torch.cat([unit_NF, is_mean_N[:, None]], dim=1)


def near_duplicates(features_NF: Tensor, *, threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """The most similar pairs of images, relative to the mean of all: of two different images it is -1.

    Args:
        features_NF: float (N, F).
        threshold: smallest cosine similarity of a pair, in [-1, 1].
        most: of the pairs, the most similar ones, >= 1.

    Returns:
        pairs int64 (P, 2), the first position below the second, and similarity float32 (P,), descending.
    """
    rows_NF = unit_rows(features_NF)
    pairs, similarity = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)
    for start in range(0, len(rows_NF), BLOCK):
        block_BF = rows_NF[start : start + BLOCK]
        cosine_BN = (block_BF @ rows_NF[start:].T).clamp(-1.0, 1.0)
        # Each pair once, and no image with itself.
        cosine_BN.masked_fill_(torch.ones_like(cosine_BN, dtype=torch.bool).tril(), -2.0)
        floor = max(threshold - ROUNDING, float(similarity[-1]) if len(similarity) == most else -1.0 - ROUNDING)
        is_pair_BN = cosine_BN >= floor
        if int(is_pair_BN.sum()) > most:  # a low threshold would list B x N of them
            is_pair_BN = largest(cosine_BN, most)
        first, second = is_pair_BN.nonzero(as_tuple=True)
        values = torch.cat([similarity, cosine_BN[first, second]])
        pairs = torch.cat([pairs, torch.stack([first, second], dim=1) + start])
        order = values.argsort(descending=True, stable=True)[:most]
        pairs, similarity = pairs[order], values[order]
    return pairs, similarity


def largest(values_BN: Tensor, count: int) -> Tensor:
    """Which are the `count` largest; of equal ones, the first in the order of rows."""
    by_row = values_BN.topk(min(count, values_BN.shape[1]), dim=1).values
    least = by_row.flatten().topk(count).values[-1]
    chosen_BN, equal_BN = values_BN > least, values_BN == least
    wanted = count - int(chosen_BN.sum())
    until_B = equal_BN.sum(1).cumsum(0)
    whole = int((until_B <= wanted).sum())  # rows of which all equal ones belong to them
    chosen_BN[:whole] |= equal_BN[:whole]
    if whole < len(values_BN):
        before = int(until_B[whole - 1]) if whole else 0
        chosen_BN[whole] |= equal_BN[whole] & (equal_BN[whole].cumsum(0) <= wanted - before)
    return chosen_BN


def outliers(features_NF: Tensor, *, k: int, most: int) -> tuple[Tensor, Tensor]:
    """The images that are least like their nearest neighbors.

    Args:
        features_NF: float (N, F), N >= 2.
        k: neighbors to compare with, capped at N - 1.
        most: how many to return, >= 1.

    Returns:
        positions int64 (M,), and the mean cosine similarity to the k nearest others, float32 (M,), ascending.
    """
    rows_NF, k = unit_rows(features_NF), min(k, len(features_NF) - 1)
    nearness = []
    for start in range(0, len(rows_NF), BLOCK):
        cosine_BN = (rows_NF[start : start + BLOCK] @ rows_NF.T).clamp(-1.0, 1.0)
        cosine_BN[torch.arange(len(cosine_BN)), torch.arange(start, start + len(cosine_BN))] = -2.0
        nearness.append(cosine_BN.topk(k, dim=1).values.mean(1))
    values, positions = torch.cat(nearness).sort(stable=True)
    return positions[:most], values[:most]
