"""Uniform numbers as a pure function of (seed, epoch, sample index, view, slot): no state, order or device.

The hash is a tree of SplitMix64 generators: each level takes the word-th output of the generator seeded by
the level above it. Plain 64-bit multiplies, so torch (int64), numba (uint64) and Triton give the same bits.

B batch, V views, S slots.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # Steele, Lea, Flood 2014: SplitMix64's increment and its two multipliers
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
UNIT = 2.0**-24  # float32 keeps 24 bits: the largest uniform is 1 - 2^-24, never 1
ORDER_OF_EPOCH = -1  # takes the place of a sample index, which is never negative


def draws(seed: int, epoch: int | Tensor, index_B: Tensor, *, views: int, slots: int) -> Tensor:
    """Draw every number a batch needs.

    Args:
        seed: any integer; only its low 64 bits count.
        epoch: epoch number, or an int64 scalar on the device of `index_B`.
        index_B: int64, position of each sample in its data set, at least 0.
        views: V, rows of the policy.
        slots: S, numbers for each view.

    Returns:
        draws_BVS: float32 in [0, 1), on the device of `index_B`.
    """
    device = index_B.device
    sample_B = _child(_epoch_key(seed, epoch, device), index_B)
    view_BV = _child(sample_B[:, None], torch.arange(views, device=device))
    hash_BVS = _child(view_BV[..., None], torch.arange(slots, device=device))
    return _shift(hash_BVS, 40).to(torch.float32) * UNIT


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits `count` samples: int64 (count,) on the CPU."""
    key = _child(_epoch_key(seed, epoch, torch.device("cpu")), ORDER_OF_EPOCH)
    return torch.argsort(_child(key, torch.arange(count)), stable=True)


def _epoch_key(seed: int, epoch: int | Tensor, device: torch.device) -> Tensor:
    root = torch.zeros((), dtype=torch.int64, device=device)
    return _child(_child(root, _signed(seed)), epoch)


def _child(key: Tensor, word: int | Tensor) -> Tensor:
    if isinstance(word, int):
        return _mix(key + _signed((word + 1) * GOLDEN))
    return _mix(key + (word + 1) * _signed(GOLDEN))


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(FIRST)
    bits = (bits ^ _shift(bits, 27)) * _signed(SECOND)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's own copies the sign bit in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same low 64 bits."""
    return (word + 2**63) % 2**64 - 2**63
