"""Uniform numbers as a pure function of (seed, epoch, sample index, view, slot): no state, order or device.

The hash is a tree of SplitMix64 generators: each level takes the word-th output of the generator seeded by
the level above it. Plain 64-bit multiplies, so torch (int64), numba (uint64) and Triton give the same bits.

B batch, V views, S slots.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # Steele, Lea, Flood 2014: SplitMix64's increment and its two multipliers
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
UNIT = 2.0**-24  # float32 keeps 24 bits: the largest uniform is 1 - 2^-24, never 1
ORDER_OF_EPOCH = -1  # takes the place of a sample index, which is never negative


class DrawKey(NamedTuple):
    """What decides the draws of some views.

    Attributes:
        seed: any integer; only its low 64 bits count.
        epoch: epoch number, or an int64 scalar on the device: one compiled graph then serves all.
        index_B: int64, position of each sample in its data set, at least 0.
        first: the policy's row that is the first of these views.
    """

    seed: int
    epoch: int | Tensor
    index_B: Tensor
    first: int


def draws(key: DrawKey, *, views: int, slots: int) -> Tensor:
    """Draw every number a batch needs.

    Args:
        key: of the first of these views.
        views: V, rows of the policy.
        slots: S, numbers for each view.

    Returns:
        draws_BVS: float32 in [0, 1), on the device of `key.index_B`.
    """
    seed, epoch, index_B, first = key
    sample_B = _child(_epoch_key(seed, epoch), index_B)
    view_BV = _child(sample_B[:, None], torch.arange(first, first + views, device=index_B.device))
    hash_BVS = _child(view_BV[..., None], torch.arange(slots, device=index_B.device))
    draws_BVS: Tensor = _shift(hash_BVS, 40).to(torch.float32) * UNIT
    return draws_BVS


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits `count` samples: int64 (count,) on the CPU."""
    key = _child(_epoch_key(seed, epoch), ORDER_OF_EPOCH)
    words = _child(key, torch.arange(count)).numpy()  # all different: a level of the hash is one to one
    return torch.from_numpy(np.argsort(words))  # numpy sorts with vectors, several times as fast as torch


def _epoch_key(seed: int, epoch: int | Tensor) -> Any:
    return _child(_child(0, seed), epoch)


def _child(key: Any, word: Any) -> Any:
    """The word-th output of the generator seeded by `key`; each a Python integer or an int64 tensor."""
    # (word + 1) * GOLDEN; torch's compiler takes that for index arithmetic, which does not wrap, but not this
    bits = _wrapped(key + _wrapped(~word * _wrapped(-GOLDEN)))
    bits = _wrapped((bits ^ _shift(bits, 30)) * _wrapped(FIRST))
    bits = _wrapped((bits ^ _shift(bits, 27)) * _wrapped(SECOND))
    return bits ^ _shift(bits, 31)


def _shift(bits: Any, by: int) -> Any:
    """Logical right shift: an int64's own copies the sign bit in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _wrapped(word: Any) -> Any:
    """What int64 keeps of a Python integer; tensors wrap by themselves."""
    return (word + 2**63) % 2**64 - 2**63 if isinstance(word, int) else word
