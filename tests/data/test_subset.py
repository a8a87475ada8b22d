"""Subsets: disjoint, stratified to within one image of each class, nested, and a function of the seed."""

import numpy as np
import pytest

from fastssl.data.convert.subset import choose
from fastssl.errors import UserError

LABELS = np.random.default_rng(0).choice([-1, 0, 1, 2, 7], 500, p=[0.1, 0.5, 0.25, 0.1, 0.05])


def shares(positions):
    kept = LABELS[positions]
    return np.array([(kept == label).sum() for label in np.unique(LABELS)])


@pytest.mark.parametrize("val_count", [0, 37, 499])
@pytest.mark.parametrize("fraction", [1.0, 0.3, 0.001])
def test_disjoint_of_the_stated_size_and_in_order(val_count, fraction):
    kept, val = choose(LABELS, seed=4, val_count=val_count, fraction=fraction)
    assert len(val) == val_count
    assert len(kept) == max(1, round((500 - val_count) * fraction))
    assert not set(kept) & set(val)
    for positions in (kept, val):
        np.testing.assert_array_equal(positions, np.unique(positions))
    if fraction == 1:
        assert len(set(kept) | set(val)) == 500


@pytest.mark.parametrize("limit", [1, 10, 100, 333, 500, 9999])
def test_every_class_in_its_share(limit):
    kept, _ = choose(LABELS, seed=1, limit=limit)
    expected = shares(np.arange(500)) * len(kept) / 500
    assert np.abs(shares(kept) - expected).max() <= 1.5


def test_a_smaller_choice_is_part_of_a_larger_one_and_seeds_differ():
    small, _ = choose(LABELS, seed=1, fraction=0.1, val_count=50)
    large, _ = choose(LABELS, seed=1, fraction=0.5, val_count=50)
    other, _ = choose(LABELS, seed=2, fraction=0.1, val_count=50)
    assert set(small) < set(large)
    assert set(small) != set(other)
    np.testing.assert_array_equal(small, choose(LABELS, seed=1, fraction=0.1, val_count=50)[0])


def test_shuffling_changes_the_order_alone():
    kept, _ = choose(LABELS, seed=-5, fraction=0.5)
    mixed, _ = choose(LABELS, seed=-5, fraction=0.5, shuffle=True)
    assert mixed.tolist() != kept.tolist()
    np.testing.assert_array_equal(np.sort(mixed), kept)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"fraction": 0}, "fraction"),
        ({"limit": 0}, "limit"),
        ({"val_count": 500}, "val_count"),
        ({"val_count": -1}, "val_count"),
    ],
)
def test_choices_that_cannot_be_made(bad, named):
    with pytest.raises(UserError, match=named):
        choose(LABELS, seed=0, **bad)
    with pytest.raises(UserError, match=r"holds no images\."):
        choose(LABELS[:0], seed=0)
