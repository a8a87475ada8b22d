"""The draws are the published hash, bit for bit, and behave as independent uniforms along every argument."""

import pytest
import torch
from reference_augment import splitmix64, uniform

from fastssl.augment.draws import DrawKey, draws, permutation

BASE = {"seed": 7, "epoch": 3, "index": 0, "view": 0, "slot": 0}

GOLDEN = [[[7908954, 12159322], [13114453, 3226565]], [[7326222, 2670477], [14689980, 4961744]]]
GOLDEN_ORDER = [6, 1, 7, 4, 3, 0, 5, 2]


def block(**shift: int) -> torch.Tensor:
    """Draws of 2,000 samples, 4 views and 8 slots, the arguments shifted by `shift`."""
    at = BASE | shift
    index_B = torch.arange(2000) * 2 + at["index"]
    draws_BVS = draws(DrawKey(at["seed"], at["epoch"], index_B, at["view"]), views=4, slots=8 + at["slot"])
    return draws_BVS[..., at["slot"] :]


def test_reference_is_the_published_generator():
    # the vector that Vigna's splitmix64.c gives for this seed
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_are_the_hash_in_plain_integers():
    draws_BVS = draws(DrawKey(-7, 3, torch.tensor([0, 5]), 0), views=2, slots=3)
    plain = [[[uniform(-7, 3, b, v, s) for s in range(3)] for v in range(2)] for b in (0, 5)]
    assert draws_BVS.dtype == torch.float32
    assert torch.equal(draws_BVS.double(), torch.tensor(plain, dtype=torch.float64))


def test_golden_bits():
    draws_BVS = draws(DrawKey(0, 0, torch.tensor([0, 49_999]), 0), views=2, slots=2)
    assert (draws_BVS * 2**24).long().tolist() == GOLDEN


def test_range_excludes_one():
    drawn = block()
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_each_slot_is_uniform():
    counts = torch.stack([torch.histc(block()[:, v, s], bins=50, min=0, max=1) for v in range(4) for s in range(8)])
    chi_square = ((counts - 40) ** 2 / 40).sum(dim=1)  # 49 degrees of freedom: mean 49, deviation 9.9
    assert chi_square.mean() == pytest.approx(49, abs=6 * 9.9 / 32**0.5)
    assert chi_square.max() < 110


@pytest.mark.parametrize("argument", BASE)
def test_neighbors_along_each_argument_are_independent(argument: str):
    here, there = block().flatten(), block(**{argument: BASE[argument] + 1}).flatten()
    correlation = torch.corrcoef(torch.stack((here, there)))[0, 1].item()
    cells = torch.bincount((here * 8).long() * 8 + (there * 8).long(), minlength=64).float()
    chi_square = ((cells - 1000) ** 2 / 1000).sum().item()  # 63 degrees of freedom: deviation 11.2
    assert abs(correlation) < 5 / len(here) ** 0.5
    assert chi_square < 63 + 5 * 11.2


def test_a_sample_draws_the_same_in_any_batch():
    index_B = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = draws(DrawKey(1, 2, index_B, 0), views=3, slots=5)
    assert torch.equal(shuffled, draws(DrawKey(1, 2, torch.arange(100), 0), views=3, slots=5)[index_B])


def test_more_views_and_slots_keep_the_first_ones():
    wide = draws(DrawKey(1, 2, torch.arange(4), 0), views=8, slots=50)
    assert torch.equal(wide[:, :2, :42], draws(DrawKey(1, 2, torch.arange(4), 0), views=2, slots=42))


def test_epoch_may_be_a_tensor():
    assert torch.equal(
        draws(DrawKey(1, torch.tensor(9), torch.arange(4), 0), views=1, slots=2),
        draws(DrawKey(1, 9, torch.arange(4), 0), views=1, slots=2),
    )


def test_permutation_visits_each_sample_once():
    assert torch.equal(permutation(0, 4, 1000).sort().values, torch.arange(1000))
    assert permutation(0, 0, 8).tolist() == GOLDEN_ORDER


def test_permutations_differ_by_epoch_and_seed():
    orders = torch.stack([permutation(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]).float()
    correlation = torch.corrcoef(orders) - torch.eye(9)
    assert correlation.abs().max() < 5 / 1000**0.5


def test_first_place_is_uniform():
    firsts = torch.tensor([permutation(0, epoch, 10)[0] for epoch in range(2000)])
    chi_square = ((torch.bincount(firsts, minlength=10) - 200) ** 2 / 200).sum()  # 9 degrees: deviation 4.2
    assert chi_square < 9 + 5 * 4.2
