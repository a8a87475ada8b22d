"""The draws are the published hash, bit for bit, and behave as independent uniforms along every argument."""

import torch
from fastssl.augment.draws import draws, permutation
from reference_augment import splitmix64, uniform


def test_draws_are_the_hash_in_plain_integers():
    drawn_BVS = draws(7, 3, torch.tensor([0, 5]), views=2, slots=3)
    plain = [[[uniform(7, 3, b, v, s) for s in range(3)] for v in range(2)] for b in (0, 5)]
    assert drawn_BVS.dtype == torch.float32
    assert torch.equal(drawn_BVS.double(), torch.tensor(plain, dtype=torch.float64))
