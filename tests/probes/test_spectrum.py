"""Figures against planted answers and numpy; warnings for each way to collapse."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.probes import spectrum
from fastssl.probes.spectrum import collapse_warnings, eigenspectrum
from fastssl.probes.table import FIGURES, figures, figures_text


def features(values: Tensor, *, rows: int = 300, offset: float = 4.0) -> Tensor:
    """Rows whose covariance has exactly these eigenvalues, in a random basis, away from the origin."""
    g = torch.Generator().manual_seed(0)
    white = torch.randn(rows, len(values), generator=g, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0)).Q * rows**0.5
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return white * values.double().sqrt() @ basis.T + offset


def test_eigenspectrum_is_numpys(monkeypatch):
    monkeypatch.setattr(spectrum, "CHUNK_ROWS", 64)
    x = features(torch.tensor([5.0, 3.0, 1.0, 0.25]))
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(eigenspectrum(x), expected, rtol=1e-10)
    np.testing.assert_allclose(eigenspectrum(x), [5, 3, 1, 0.25], rtol=1e-10)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_finds_the_planted_exponent(exponent):
    found = figures(features(torch.arange(1.0, 81) ** -exponent))
    assert found["alpha"] == pytest.approx(exponent, rel=1e-6)
    assert found["alpha_r2"] == pytest.approx(1.0, abs=1e-9)


def test_alpha_fits_ranks_4_to_50_with_weights():
    values = torch.arange(1.0, 81).double() ** -1
    values[:3], values[50:] = 100.0, 1e-9  # ranks outside the fit may be anything
    assert spectrum.alpha(values) == pytest.approx((1.0, 1.0))
    values[9] *= 2
    rank = np.arange(4, 51)
    slope, level = np.polyfit(np.log(rank), np.log(values[3:50].numpy()), 1, w=rank**-0.5)
    left = (np.log(values[3:50].numpy()) - slope * np.log(rank) - level) ** 2 / rank
    y = np.log(values[3:50].numpy())
    spread = (y - np.average(y, weights=1 / rank)) ** 2 / rank
    assert spectrum.alpha(values) == pytest.approx((-slope, 1 - left.sum() / spread.sum()))


def test_alpha_is_left_out_when_ranks_are_too_few():
    assert "alpha" not in figures(features(torch.ones(5)))
    assert "alpha" not in figures(features(torch.tensor([1.0] * 5 + [0.0] * 20)))
    assert "alpha" in figures(features(torch.tensor([1.0] * 6 + [0.0] * 20)))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_are_counted(rank):
    found = figures(features(torch.tensor([2.0] * rank + [0.0] * (8 - rank))))
    assert found["rankme"] == pytest.approx(rank, rel=1e-5)
    assert found["participation_ratio"] == pytest.approx(rank, rel=1e-6)


def test_rankme_and_participation_are_their_formulas():
    values = np.array([5.0, 3.0, 1.0, 0.2])
    share = np.sqrt(values) / np.sqrt(values).sum()
    found = figures(features(torch.from_numpy(values)))
    assert found["rankme"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found["participation_ratio"] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found["dims"] == 4


def test_rankme_is_of_centered_features_and_of_the_features_as_they_are():
    x = features(torch.tensor([5.0, 3.0, 1.0, 0.2]))
    found = figures(x)
    for key, rows in (("rankme", x - x.mean(0)), ("rankme_uncentered", x)):
        share = np.linalg.svd(rows.numpy(), compute_uv=False)
        share /= share.sum()
        assert found[key] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found["rankme"] > 1.2 * found["rankme_uncentered"]  # the mean of 4 is the strongest direction
    assert "RankMe (centered) " in figures_text(found)
    assert ", RankMe (uncentered) " in figures_text(found)
    assert set(figures(x)) - set(figures(x, while_training=True)) == {"rankme_uncentered"}


def test_residuals_are_their_formulas():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=g)
    x[:, 1] += 2 * x[:, 0]
    x[:, 5] = 3.0  # dead, so outside the mean
    correlation = np.abs(np.corrcoef(x[:, :5].numpy().T))
    expected = correlation[~np.eye(5, dtype=bool)].mean()
    assert figures(x)["orthogonality_residual"] == pytest.approx(expected, rel=1e-5)
    assert spectrum.orthogonality_residual(x) == pytest.approx(expected, rel=1e-5)
    assert figures(x)["dead_dims"] == 1
    views = torch.randn(4, 50, 6, generator=g) + 2 * torch.randn(50, 6, generator=g)
    within = np.mean([np.var(views[:, n, f].numpy(), ddof=1) for n in range(50) for f in range(6)])
    total = np.mean([np.var(views[:, :, f].numpy()) for f in range(6)])
    assert figures(x, views_VNF=views)["invariance_residual"] == pytest.approx(within / total, rel=1e-5)


def test_invariance_residual_runs_from_agreement_to_unrelated():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(2))
    assert spectrum.invariance_residual(torch.stack([x, x, x])) == 0
    unrelated = torch.randn(3, 2000, 8, generator=torch.Generator().manual_seed(3))
    assert spectrum.invariance_residual(unrelated) == pytest.approx(1, abs=0.05)
    assert spectrum.invariance_residual(torch.ones(2, 5, 3)) == 0


@pytest.mark.parametrize("count", [20, 40])
def test_few_images_of_wide_features_are_no_collapse(count):
    """So many centered images span count - 1 directions at most, fewer than a hundredth of many features."""
    found = figures(torch.randn(count, 4096, generator=torch.Generator().manual_seed(0)))
    assert found["rankme"] < 4096 / 100
    assert "few directions" not in collapse_warnings(found)


def test_healthy_features_raise_no_warning():
    assert collapse_warnings(figures(features(torch.arange(1.0, 65) ** -1))) == {}
    assert collapse_warnings(figures(torch.randn(50, 100, generator=torch.Generator().manual_seed(0)))) == {}


@pytest.mark.parametrize("level", [0.0, 1.0, 0.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_features_have_collapsed(level, dtype):
    found = figures(torch.full((1000, 8), level, dtype=dtype))
    assert found["dead_dims"] == 8
    assert found["rankme"] == 0
    warnings = collapse_warnings(found)
    assert warnings.keys() == {"constant"}
    assert "All 8 features are constant" in warnings["constant"]
    assert "loss" in warnings["constant"]


def test_other_ways_to_collapse():
    g = torch.Generator().manual_seed(0)
    one = torch.randn(200, 1, generator=g)
    cases = {
        "span only about 1.0 directions": one * torch.rand(16, generator=g),
        "repeat each other": one + 0.3 * torch.randn(200, 16, generator=g),
        "10 of 16 features are constant": torch.randn(200, 16, generator=g) * (torch.arange(16) > 9),
    }
    for words, x in cases.items():
        assert words in " ".join(collapse_warnings(figures(x)).values())


def test_narrow_features_and_unlike_views_are_warned_of_once_training_has_settled():
    # every dimension mostly the one strong direction: correlated, with a small participation ratio
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=g) * (0.7 + torch.rand(64, generator=g)) + torch.randn(400, 64, generator=g)
    narrow = figures(x, views_VNF=torch.stack([x, x]))
    assert narrow["participation_ratio"] < spectrum.FEW_DIRECTIONS
    assert collapse_warnings(narrow, done=1.0).keys() == {"narrow"}
    assert collapse_warnings(narrow, done=0.2) == {}
    views = torch.randn(2, 400, 64, generator=g)
    unlike = figures(views[0], views_VNF=views)
    assert collapse_warnings(unlike, done=1.0).keys() == {"variant"}
    assert collapse_warnings(unlike, done=0.2) == {}
    for warning in (*collapse_warnings(narrow).values(), *collapse_warnings(unlike).values()):
        assert "loss" in warning
        assert "auto" in warning


def test_the_table_names_every_figure_and_its_number_of_images():
    views = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0))
    assert figures(views[0], views_VNF=views).keys() == {probe.key for probe in FIGURES}
    assert figures(views[0])["spectrum_images"] == 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features_NF = torch.randn(9, 4)
    features_NF[3, 2] = value
    with pytest.raises(UserError, match="not all finite"):
        figures(features_NF)
    with pytest.raises(UserError, match="0 features of 4 dimensions"):
        eigenspectrum(torch.zeros(0, 4))
