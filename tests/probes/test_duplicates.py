"""Near-duplicates and outliers against a double loop, across blocks."""

import pytest
import torch

from fastssl.probes import duplicates
from fastssl.probes.duplicates import near_duplicates, outliers


@pytest.fixture(params=[3, 1024], ids=["many blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(duplicates, "BLOCK", request.param)
    return request.param


def features() -> torch.Tensor:
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    x[7] = x[2] * 1.001
    x[9] = x[4] + 0.05 * x[5]
    x[10] = -8 * x[1]
    return x


def cosines(x: torch.Tensor) -> torch.Tensor:
    y = x - x.mean(0)
    return torch.stack([torch.stack([torch.dot(a, b) / a.norm() / b.norm() for b in y]) for a in y])


def test_pairs_are_those_of_the_double_loop(block: int) -> None:
    x = features()
    expected = sorted(((float(c), i, j) for i, row in enumerate(cosines(x)) for j, c in enumerate(row) if i < j))[::-1]
    pairs, similarity = near_duplicates(x, threshold=0.3, most=100)
    wanted = [(i, j) for c, i, j in expected if c >= 0.3]
    assert [tuple(pair) for pair in pairs.tolist()] == wanted
    assert wanted[0] == (2, 7)
    torch.testing.assert_close(similarity, torch.tensor([c for c, _, _ in expected if c >= 0.3]))
    assert near_duplicates(x, threshold=0.3, most=2)[0].tolist() == pairs[:2].tolist()
    everything = [[i, j] for _, i, j in expected]
    for most in (3, 7, len(everything)):
        assert near_duplicates(x, threshold=-1.0, most=most)[0].tolist() == everything[:most]
    assert near_duplicates(x, threshold=1.0, most=5)[0].shape == (0, 2) or similarity[0] >= 1 - 1e-6


@pytest.mark.parametrize("most", [1, 5, 20, 60])
def test_of_equal_pairs_the_first_are_kept(most: int, block: int) -> None:
    half = torch.randint(0, 2, (24, 16), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    x = torch.cat([half, -half])  # centered, of length 4: cosines are exact eighths, many equal
    expected = [
        (c, i, j) for i, row in enumerate(cosines(x)) for j, c in enumerate(row.mul(16).round().tolist()) if i < j
    ]
    wanted = sorted(expected, key=lambda pair: -pair[0])[:most]  # stable: in the order of rows
    assert near_duplicates(x, threshold=-1.0, most=most)[0].tolist() == [[i, j] for _, i, j in wanted]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_equal_images_are_pairs_however_few_there_are(count: int, block: int) -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(count, -1)
    pairs, similarity = near_duplicates(x, threshold=1.0, most=100)
    assert len(pairs) == count * (count - 1) // 2
    assert similarity.tolist() == [1.0] * len(pairs)
    assert outliers(x, k=5, most=1)[1].tolist() == [1.0]


def test_rounding_keeps_no_pair_from_the_ends_of_the_range(block: int) -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    pairs, similarity = near_duplicates(torch.cat([x, x]), threshold=1.0, most=100)
    assert sorted(pairs.tolist()) == [[i, i + 40] for i in range(40)]
    assert similarity.max() <= 1
    assert len(near_duplicates(x[:2], threshold=-1.0, most=5)[0]) == 1


def test_outliers_are_far_from_their_nearest(block: int) -> None:
    x, k = features(), 3
    nearest = cosines(x).fill_diagonal_(-2).sort(dim=1, descending=True).values[:, :k].mean(1)
    positions, values = outliers(x, k=k, most=11)
    torch.testing.assert_close(values, nearest.sort().values)
    torch.testing.assert_close(nearest[positions], values)
    assert outliers(x[:2], k=5, most=1)[0].shape == (1,)
