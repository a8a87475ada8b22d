"""Which samples to take: a fraction, a limit, a validation split, each with every class in its share.

N samples before the choice.
"""

import numpy as np
from numpy.typing import NDArray

from fastssl.errors import UserError, option

_64 = 0xFFFFFFFFFFFFFFFF  # a seed may be negative; numpy takes none that is


def choose(
    labels_N: NDArray[np.int64],
    *,
    seed: int,
    val_count: int = 0,
    fraction: float = 1.0,
    limit: int | None = None,
    shuffle: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to keep and positions of the validation split, int64, disjoint; a function of its arguments.

    Args:
        labels_N: int64 class of each sample; -1, no class, counts as one more class.
        seed: names the choice. A smaller fraction or limit of the same seed is a subset of a larger one.
        val_count: size of the validation split, taken first.
        fraction: of what remains, in (0, 1].
        limit: the most to keep of that.
        shuffle: keep them in a random order rather than in their own.
    """
    count = len(labels_N)
    check_fraction(fraction)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}.", "Set it to 1 or more.")
    if not count:
        raise UserError("The source holds no images.", "Give one that does.")
    if not 0 <= val_count < count:
        raise UserError(f"val_count is {val_count}, there are {count} images.", f"Set it below {count}.")
    order_N = _spread(labels_N, seed)
    keep = max(1, round((count - val_count) * fraction))
    chosen = order_N[val_count : val_count + (keep if limit is None else min(keep, limit))]
    chosen = np.random.default_rng([seed & _64, 1]).permutation(chosen) if shuffle else np.sort(chosen)
    return chosen, np.sort(order_N[:val_count])


def check_fraction(fraction: float) -> None:
    """UserError for what is no share."""
    if not 0 < fraction <= 1:
        raise UserError(f"{option('fraction')} is {fraction}.", f"Set {option('fraction')} above 0 and at most 1.")


def _spread(labels_N: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """An order in which every prefix holds each class in its share: random within a class, classes interleaved."""
    rng = np.random.default_rng([seed & _64, 0])
    shuffled_N = rng.permutation(len(labels_N))
    by_class_N = shuffled_N[np.argsort(labels_N[shuffled_N], kind="stable")]
    _, starts, counts = np.unique(labels_N[by_class_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(labels_N)) - np.repeat(starts, counts)
    when_N = (rank_N + 0.5) / np.repeat(counts, counts)  # the k-th of n falls at (k + 1/2) / n of the way
    return by_class_N[np.argsort(when_N, kind="stable")].astype(np.int64)
