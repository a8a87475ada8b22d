"""The theory, exactly: on a graph whose eigenfunctions are known the losses find them, weight by weight.

The batch lists every pair of augmentations of every image, so the loss is its own expectation and each
statement below holds to rounding, not on average. The graph and its figure are in bench/eigenspace.py.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import one_torch_thread
from torch import Tensor

from fastssl.losses import barlow_twins, vicreg
from fastssl.losses.barlow_twins import redundancy_rule

sys.path.append(str(Path(__file__).parents[2] / "bench"))
spec = importlib.util.spec_from_file_location("eigenspace", Path(__file__).parents[2] / "bench/eigenspace.py")
eigenspace = importlib.util.module_from_spec(spec)
spec.loader.exec_module(eigenspace)

STATES = eigenspace.line_graph(images=12, reach=1)
VALUES, FUNCTIONS = eigenspace.eigenfunctions(STATES)
BATCH = eigenspace.full_batch(STATES, 2)


@pytest.fixture(autouse=True)
def one_thread():
    with one_torch_thread():
        yield


def minimize(index_VN: Tensor, dim: int, loss, *, seed: int = 0) -> Tensor:
    """A table of features at the loss's minimum: LBFGS from random features."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(index_VN.max()) + 1, dim, generator=generator, dtype=torch.float64).requires_grad_()
    solver = torch.optim.LBFGS(
        [table], max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(table[index_VN])
        value.backward()
        return value

    solver.step(closure)
    return table.detach()


def leading(table: Tensor, functions: Tensor) -> Tensor:
    """How much of each centered feature is the dominant eigenfunction, 0 to 1."""
    return (torch.nn.functional.normalize(table - table.mean(0), dim=0).T @ functions[:, 1]).square()


def test_the_graph_is_what_it_says():
    A = eigenspace.transition(STATES)
    torch.testing.assert_close(A.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(A, A.T)
    place = torch.arange(12, dtype=torch.float64) + 0.5
    for k in range(5):  # cosines, by hand
        wave = torch.cos(torch.pi * k * place / 12)
        value = ((1 + 2 * torch.cos(torch.tensor(torch.pi * k / 12, dtype=torch.float64))) / 3) ** 2
        torch.testing.assert_close(VALUES[k], value)
        overlap = torch.nn.functional.normalize(wave, dim=0) @ FUNCTIONS[:, k]
        torch.testing.assert_close(overlap.abs(), torch.ones((), dtype=torch.float64))
    assert BATCH.shape == (2, 12 * 9)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("form", ["leave_one_out", "authors"])
def test_barlow_twins_spans_the_top_eigenspace(dim, views, form):
    weight = redundancy_rule(dim, views, form=form)
    loss = partial(barlow_twins, redundancy_weight=weight, form=form, standardize="per_view", l2_normalize=False)
    table = minimize(eigenspace.full_batch(STATES, views), dim, lambda z: loss(z)["loss"])
    assert eigenspace.angle_deg(table, FUNCTIONS) < 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_vicreg_spans_the_top_eigenspace(dim):
    # Weights that keep the spread below one, off the hinge's kink, where a minimum can be met to rounding.
    loss = partial(vicreg, invariance_weight=10.0, variance_weight=1.0, covariance_weight=500.0)
    table = minimize(BATCH, dim, lambda z: loss(z)["loss"])
    assert eigenspace.angle_deg(table, FUNCTIONS) < 0.1


def test_a_random_table_does_not_span_it():
    table = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert eigenspace.angle_deg(table, FUNCTIONS) > 30


@pytest.mark.parametrize("seed", [0, 1])
def test_a_low_weight_first_copies_the_dominant_direction(seed):
    """0.0051 is the weight for D = 8192; for D = 2 the rule's is 330 times larger."""
    states = eigenspace.line_graph()
    functions, batch = eigenspace.eigenfunctions(states)[1], eigenspace.full_batch(states, 2)
    low = eigenspace.descend(batch, 2, eigenspace.barlow(0.0051), steps=900, seed=seed)
    assert eigenspace.similarity(low) > 0.95
    assert leading(low, functions).min() > 0.95
    rule = redundancy_rule(2, 2)
    scaled = eigenspace.descend(batch, 2, eigenspace.barlow(rule), steps=900, seed=seed)
    assert eigenspace.similarity(scaled) < 0.15
    assert leading(scaled, functions).min() < 0.7
    assert eigenspace.angle_deg(scaled, functions) < 3


@pytest.mark.parametrize("views", [2, 4, 16])
def test_the_mean_of_views_approaches_the_operator_as_one_over_v(views):
    function = FUNCTIONS[:, 1]
    A = eigenspace.transition(STATES)
    variance = float((A @ function.square() - (A @ function).square()).mean())
    error = eigenspace.view_mean_error(STATES, function, views, draws=6000)
    assert error * views == pytest.approx(variance, rel=0.03)
