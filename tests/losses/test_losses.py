"""The losses against loops, the papers' code and each other's identities; cost by counting, not timing."""

import math
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastssl import build
from fastssl.build.losses import LOSSES as TABLE
from fastssl.errors import UserError
from fastssl.losses import barlow_twins, sigreg, vicreg
from fastssl.losses.barlow_twins import C as BARLOW_C
from fastssl.losses.barlow_twins import redundancy_rule
from fastssl.losses.loss import Loss
from fastssl.losses.sigreg import directions
from fastssl.losses.vicreg import FLOOR, invariance_rule
from fastssl.losses.vicreg import C as VICREG_C
from fastssl.models.pretrainer import parameter_count
from fastssl.recipe.load import load
from fastssl.recipe.schema import loss_sections

SHAPES = [(2, 7, 5), (3, 5, 9), (4, 9, 3), (5, 2, 4), (2, 3, 1)]
reference_barlow = partial(barlow_twins, form="leave_one_out", standardize="per_view", l2_normalize=False)
authors_barlow = partial(barlow_twins, form="authors", standardize="joint", l2_normalize=True)
barlow_risk, vicreg_risk = TABLE["barlow_twins"].collapse_risk, TABLE["vicreg"].collapse_risk
paper_vicreg = partial(vicreg, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0)
lejepa = partial(sigreg, seed=reference.SEED)
LOSSES = {
    "reference": partial(reference_barlow, redundancy_weight=0.1),
    "authors": partial(authors_barlow, redundancy_weight=0.1),
    "vicreg": paper_vicreg,
    "vicreg authors": partial(paper_vicreg, form="authors"),
    "sigreg": lejepa,
}


@pytest.fixture(params=LOSSES.values(), ids=LOSSES.keys())
def loss(request):
    return request.param


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (z * 0.7 + 0.3).requires_grad_()


def seeded(row: Loss) -> dict[str, int]:
    """What a row of the table takes besides embeddings and settings."""
    return {"seed": reference.SEED} if row.is_seeded else {}


def value_and_gradient(loss: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("standardize", ["per_view", "joint"])
@pytest.mark.parametrize("form", ["leave_one_out", "authors"])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_barlow_equals_the_loops_in_value_and_gradient(shape, standardize, form, l2_normalize):
    z = embeddings(*shape)
    fast = barlow_twins(z, redundancy_weight=0.3, form=form, standardize=standardize, l2_normalize=l2_normalize)["loss"]
    columns = getattr(reference, f"standardize_{standardize}")(reference.to_sphere(z) if l2_normalize else z)
    slow = getattr(reference, f"barlow_{form}")(columns, 0.3)
    assert_same(value_and_gradient(fast, z), value_and_gradient(slow, z))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["leave_one_out", "authors"])
def test_vicreg_equals_the_loops_in_value_and_gradient(shape, form):
    z = embeddings(*shape)
    fast = vicreg(z, invariance_weight=3.0, variance_weight=5.0, covariance_weight=0.7, form=form)["loss"]
    slow = {"leave_one_out": reference.vicreg, "authors": reference.vicreg_authors}[form](z, 3.0, 5.0, 0.7)
    assert_same(value_and_gradient(fast, z), value_and_gradient(slow, z))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slices", [1, 6])
def test_sigreg_equals_the_loops_in_value_and_gradient(shape, slices):
    z = embeddings(*shape)
    fast = sigreg(z, seed=9, sigreg_weight=0.4, slices=slices)["loss"]
    slow = reference.sigreg(z, 0.4, directions(shape[2], slices, seed=9, like=z))
    assert_same(value_and_gradient(fast, z), value_and_gradient(slow, z))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(("V", "B", "D"), [(2, 7, 5), (4, 5, 3)])
def test_every_loss_of_the_table_equals_its_slow_formula(name, V, B, D):
    z = embeddings(V, B, D)
    slow = reference.LOSSES[name](z, **TABLE[name].weights(D, V))
    fast = TABLE[name].function(z, **seeded(TABLE[name]))["loss"]
    assert_same(value_and_gradient(fast, z), value_and_gradient(slow, z))


@pytest.mark.parametrize(("B", "D"), [(7, 5), (5, 13)])
def test_two_views_are_the_reference_exactly(B, D):
    z = embeddings(2, B, D)
    assert_same(
        value_and_gradient(reference_barlow(z, redundancy_weight=0.0051)["loss"], z),
        value_and_gradient(reference.barlow_two_views(z, 0.0051), z),
    )
    # The published module: batch norm without affine parameters, C = bn(z1)' bn(z2) / N.
    bn = torch.nn.BatchNorm1d(D, affine=False, dtype=torch.float64)
    C = bn(z[0]).T @ bn(z[1]) / B
    off = C - C.diagonal().diag()
    published = (C.diagonal() - 1).pow(2).sum() + 0.0051 * off.pow(2).sum()
    assert_same(
        value_and_gradient(reference_barlow(z, redundancy_weight=0.0051)["loss"], z),
        value_and_gradient(published, z),
    )


def test_two_view_vicreg_is_the_published_code():
    z = embeddings(2, 9, 6)
    x, y = z
    repr_loss = torch.nn.functional.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    spread = [torch.relu(1 - torch.sqrt(a.var(dim=0) + 1e-4)).mean() / 2 for a in (x, y)]
    covs = [a.T @ a / (len(a) - 1) for a in (x, y)]
    cov_loss = sum((c - c.diagonal().diag()).pow(2).sum() / 6 for c in covs)
    published = 25 * repr_loss + 25 * sum(spread) + cov_loss
    assert_same(value_and_gradient(paper_vicreg(z)["loss"], z), value_and_gradient(published, z))


def test_order_of_views_images_and_dimensions_changes_nothing(loss):
    z = embeddings(4, 9, 6)
    plain, gradient = value_and_gradient(loss(z)["loss"], z)
    for axis, order in ((0, [2, 0, 3, 1]), (1, [8, 1, 5, 0, 3, 2, 7, 6, 4]), (2, [5, 3, 0, 1, 2, 4])):
        if loss is lejepa and axis == 2:  # the directions are not turned with the dimensions
            continue
        index = torch.tensor(order)
        moved, moved_gradient = value_and_gradient(loss(z.index_select(axis, index))["loss"], z)
        assert_same((plain, gradient), (moved, moved_gradient))


def test_mean_view_correlation_is_the_mean_of_all_pairs():
    V, B, D = 5, 8, 3
    columns = reference.standardize_per_view(embeddings(V, B, D))
    m = [sum(columns[v][i] for v in range(V)) / V for i in range(D)]
    for i in range(D):
        for j in range(D):
            pairs = [reference.correlation(columns[v], columns[w], i, j) for v in range(V) for w in range(V)]
            torch.testing.assert_close(reference.correlation(m, m, i, j), sum(pairs) / V**2)


@pytest.mark.parametrize("V", [2, 3, 8])
def test_a_mean_with_the_view_itself_shrinks_invariance(V):
    z = embeddings(V, 9, 4) * 1e6  # so that eps is nothing against the variance
    per_view = {"standardize": "per_view", "l2_normalize": False, "redundancy_weight": 0.0}
    with_self = barlow_twins(z, form="authors", **per_view)["invariance"]
    without = barlow_twins(z, form="leave_one_out", **per_view)["invariance"]
    torch.testing.assert_close(with_self, ((V - 1) / V) ** 2 * without, rtol=1e-10, atol=0)


def test_wide_embeddings_take_the_cheap_product_to_the_same_result(loss):
    z = embeddings(3, 4, 17)
    cheap = value_and_gradient(loss(z)["loss"], z)
    full = value_and_gradient(loss(z, all_sum=lambda x: x)["loss"], z)
    assert_same(cheap, full)


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-8])
@pytest.mark.parametrize("level", [0.0, 3.0])
@pytest.mark.parametrize("B", [1, 2, 6])
def test_collapse_gives_finite_value_and_gradient(loss, spread, level, B):
    z = (level + spread * embeddings(3, B, 4, dtype=torch.float32)).detach().requires_grad_()
    value, gradient = value_and_gradient(loss(z)["loss"], z)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert value > 0


def test_one_dead_dimension_leaves_the_gradient_finite(loss):
    z = embeddings(2, 6, 5).detach()
    z[..., 2] = 0.5
    _, gradient = value_and_gradient(loss(z.requires_grad_())["loss"], z)
    assert gradient.isfinite().all()
    assert gradient[..., 0].abs().sum() > 0


def test_autocast_changes_nothing(loss):
    z = embeddings(3, 16, 8, dtype=torch.float32)
    plain = value_and_gradient(loss(z)["loss"], z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(z)["loss"]
    inside = value_and_gradient(inside, z)  # backward belongs outside autocast, as PyTorch says
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_terms_are_float32(loss, dtype):
    z = embeddings(2, 8, 4, dtype=torch.float32).detach().to(dtype).requires_grad_()
    terms = loss(z)
    assert {t.dtype for t in terms.values()} == {torch.float32}
    assert value_and_gradient(terms["loss"], z)[1].dtype == dtype


@pytest.mark.parametrize(("B", "D"), [(64, 24), (24, 300)])
def test_float32_is_close_to_float64(loss, B, D):
    z = embeddings(3, B, D)
    exact = value_and_gradient(loss(z)["loss"], z)
    single = z.detach().float().requires_grad_()
    value, gradient = value_and_gradient(loss(single)["loss"], single)
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=0)
    assert (gradient.double() - exact[1]).norm() < 1e-5 * exact[1].norm()


def test_only_the_loss_carries_a_gradient(loss):
    terms = loss(embeddings(2, 8, 4))
    assert {name for name, t in terms.items() if t.requires_grad} == {"loss"}


def test_the_terms_add_up():
    z = embeddings(3, 8, 4)
    b = reference_barlow(z, redundancy_weight=0.2)
    torch.testing.assert_close(b["loss"].detach(), b["invariance"] + 0.2 * b["redundancy"])
    v = paper_vicreg(z)
    torch.testing.assert_close(v["loss"].detach(), 25 * v["invariance"] + 25 * v["variance"] + v["covariance"])
    s = lejepa(z, sigreg_weight=0.3)
    torch.testing.assert_close(s["loss"].detach(), 0.7 * s["invariance"] + 0.3 * s["sigreg"])


def test_the_batch_size_is_the_tensors(loss):
    z = embeddings(2, 12, 4).detach()
    twice = torch.cat([z, z], 1)
    if loss is lejepa:  # a statistic of a test grows with the number of samples
        once, both = loss(z), loss(twice)
        torch.testing.assert_close(once["invariance"], both["invariance"])
        torch.testing.assert_close(2 * once["sigreg"], both["sigreg"])
    elif loss.func is not vicreg:  # VICReg divides by N - 1
        torch.testing.assert_close(loss(z)["loss"], loss(twice)["loss"])
    assert loss(z[:, :5])["loss"].isfinite()


@pytest.mark.parametrize(("B", "D"), [(64, 16), (16, 64)])
def test_cost_is_linear_in_views(loss, B, D):
    def cost(V: int) -> tuple[int, int]:
        saved: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        z = embeddings(V, B, D)
        with (
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            loss(z)["loss"].backward()
        return flops.get_total_flops(), sum(saved.values())

    (flops_2, bytes_2), (flops_16, bytes_16) = cost(2), cost(16)
    assert 0 < flops_16 <= 8 * flops_2
    assert bytes_2 < bytes_16 <= 8 * bytes_2


@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 3)])
def test_a_single_view_is_refused(loss, shape):
    with pytest.raises(UserError, match="compares views"):
        loss(embeddings(*shape))


# The authors' best weights for D = 64 ... 8192, two views (arXiv 2312.10725 and its code).
DIMS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
BARLOW_BEST = [0.04, 0.04, 0.02, 0.01, 0.002, 0.001, 0.0004, 0.0008]
VICREG_BEST = [20, 20, 25, 25, 25, 75, 200, 800]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def test_the_barlow_rule_is_a_fit_to_the_authors_table():
    c = geometric_mean([d * w for d, w in zip(DIMS, BARLOW_BEST, strict=True)])
    assert pytest.approx(c, rel=1e-3) == BARLOW_C
    x, y = torch.tensor(DIMS).log(), torch.tensor(BARLOW_BEST).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-1.05, abs=0.005)
    for d, w in zip(DIMS, BARLOW_BEST, strict=True):
        assert 1 / 2.1 < redundancy_rule(d, 2) / w < 2.1
        assert barlow_risk(d, 2, redundancy_weight=w) is None


def test_the_vicreg_rule_is_a_fit_to_the_authors_table():
    assert pytest.approx(geometric_mean(VICREG_BEST[:4]), rel=2e-3) == FLOOR
    ratios = [d / w for d, w in zip(DIMS[4:], VICREG_BEST[4:], strict=True)]
    assert pytest.approx(geometric_mean(ratios), rel=3e-3) == VICREG_C
    for d, w in zip(DIMS, VICREG_BEST, strict=True):
        assert 1 / 2.25 < invariance_rule(d) / w < 2.25
        assert vicreg_risk(d, 2, invariance_weight=w, variance_weight=w) is None


def test_the_rule_knows_views_and_form():
    assert redundancy_rule(256, 8) == redundancy_rule(256, 2)
    authors = redundancy_rule(256, 4, form="authors")
    assert authors == pytest.approx(redundancy_rule(256, 4) * 9 / 16)
    # Their own choices with several views, D = 256: 0.01 for V = 4 and V = 8.
    for V in (4, 8):
        assert redundancy_rule(256, V, form="authors") == pytest.approx(0.01, rel=0.3)


def test_a_weight_far_above_the_rule_is_a_risk():
    sentence = barlow_risk(256, 2, redundancy_weight=1.0)
    assert sentence is not None
    assert "redundancy_weight 1 is 77 times the rule's" in sentence
    assert "set it to auto" in sentence
    assert barlow_risk(8192, 2, redundancy_weight=0.0004) is None
    low = vicreg_risk(256, 2, invariance_weight=1.0, variance_weight=25.0)
    assert low is not None
    assert "loss.invariance_weight 1 is 22 times below" in low
    assert vicreg_risk(64, 2, invariance_weight=750.0, variance_weight=750.0) is None
    assert vicreg_risk(256, 2, covariance_weight=0.0) is None


def test_auto_is_the_rules_weight():
    z = embeddings(3, 8, 6)
    by_rule = barlow_twins(z, redundancy_weight=redundancy_rule(6, 3))
    assert torch.equal(barlow_twins(z)["loss"], by_rule["loss"])
    rule = invariance_rule(6)
    by_rule = vicreg(z, invariance_weight=rule, variance_weight=rule, covariance_weight=1.0)
    assert torch.equal(vicreg(z)["loss"], by_rule["loss"])
    part = vicreg(z, covariance_weight=2.0)
    expected = by_rule["loss"] + by_rule["covariance"]
    torch.testing.assert_close(part["loss"].detach(), expected.detach())


def test_the_table_and_the_schema_name_the_same_losses_and_settings():
    assert set(TABLE) == set(loss_sections())
    for name, section in loss_sections().items():
        settings = {key: field.default for key, field in section.model_fields.items() if key != "name"}
        terms = TABLE[name].function(embeddings(2, 8, 4), **settings, **seeded(TABLE[name]))
        assert tuple(terms) == ("loss", *TABLE[name].terms)
        weights = TABLE[name].weights(4, 2, **settings)
        assert set(weights) == {key for key in settings if key.endswith("_weight")}
        assert TABLE[name].collapse_risk(4, 2, **settings) is None


def test_the_authors_recipe_has_their_loss_and_their_network():
    """Their loss as their code has it, at the recipe's V, B and D: the gradient is theirs to 0.4 %."""
    recipe = load("cifar10_authors.yaml")
    V, B, D = recipe.augment.views, recipe.data.batch_size, recipe.model.projector[-1]
    z = (embeddings(V, B, D) + embeddings(1, B, D, seed=1)).detach().requires_grad_()  # views of an image are related
    theirs = torch.autograd.grad(reference.barlow_authors_code(z, recipe.loss.redundancy_weight), z)[0]

    def error(*changes: str) -> float:
        ours = torch.autograd.grad(build.losses.loss(load(recipe, changes))(z)["loss"], z)[0]
        return float((ours - theirs).norm() / theirs.norm())

    assert error() < 0.004
    assert error("loss.standardize=per_view") > 0.1
    with torch.device("meta"):
        network = build.model.network(recipe, in_channels=3, device=torch.device("meta"))
    assert parameter_count(network) == 24_090_944


def test_sigreg_is_small_for_a_gaussian_and_grows_with_every_way_to_leave_it():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(2, 1000, 8, generator=generator)
    radius = torch.where(torch.arange(1000) % 2 == 0, 0.1, 1.99**0.5)[:, None]  # the same covariance, another shape
    flat = torch.cat([gaussian[..., :4] * 2**0.5, torch.zeros_like(gaussian[..., :4])], 2)  # collapsed to half
    axes = {
        "a scale": 1.5 * gaussian,
        "a shift": gaussian + 0.5,
        "a shape": radius * gaussian,
        "half the dimensions": flat,
    }
    base = float(lejepa(gaussian, slices=64)["sigreg"])
    # Of N normal numbers the statistic is N * (variance of the characteristic function / N), integrated:
    t = torch.linspace(-3, 3, 33)
    expected = float(torch.trapezoid((1 - torch.exp(-(t**2))) * torch.exp(-(t**2) / 2), t))
    assert base == pytest.approx(expected, rel=0.3)
    for z in axes.values():
        assert float(lejepa(z, slices=64)["sigreg"]) > 3 * base


def test_directions_are_unit_vectors_that_follow_from_the_seed():
    like = torch.zeros(())
    first = directions(16, 5000, seed=1, like=like)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(5000))
    assert torch.equal(first, directions(16, 5000, seed=1, like=like))
    assert not torch.isclose(first, directions(16, 5000, seed=2, like=like)).any(dim=0).all()
    # uniform on the sphere: second moments are the identity over D
    torch.testing.assert_close(first @ first.T / 5000, torch.eye(16) / 16, rtol=0, atol=0.01)
    in_double = directions(16, 5000, seed=1, like=like.double())
    torch.testing.assert_close(in_double.float(), first)


def test_one_graph_of_sigreg_serves_every_seed():
    from torch._dynamo.testing import CompileCounterWithBackend  # here: it takes long to import

    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(sigreg, backend=graphs, dynamic=False, fullgraph=True)
    z = embeddings(3, 8, 6, dtype=torch.float32)
    for seed in (1, 2, 2**32 - 1):
        plain = value_and_gradient(sigreg(z, seed=seed, slices=8)["loss"], z)
        assert_same(value_and_gradient(compiled(z, seed=torch.tensor(seed), slices=8)["loss"], z), plain, 1e-6)
    assert graphs.frame_count == 1


def test_sigreg_refuses_and_warns():
    with pytest.raises(UserError, match=r"sigreg_weight is 1\.5"):
        lejepa(embeddings(2, 4, 3), sigreg_weight=1.5)
    risk = TABLE["sigreg"].collapse_risk
    assert "set it to auto" in str(risk(64, 2, sigreg_weight=0.0))
    assert risk(64, 2, sigreg_weight=0.05) is None


def test_the_seed_of_a_step_follows_from_the_recipes_seed_and_the_step():
    def seeds(*changes: str) -> list[int]:
        of_step = build.losses.seeds(load("quickstart.yaml", ["loss={name: sigreg}", *changes]))
        return [of_step(step) for step in range(200)]

    assert seeds() == seeds()
    assert len({*seeds(), *seeds("seed=1")}) == 400
    assert 0 <= min(seeds()) <= max(seeds()) < 2**32
    assert build.losses.seeds(load("quickstart.yaml")) is None


@pytest.mark.parametrize(
    ("loss", "arguments", "fix"),
    [
        (barlow_twins, {"form": "author"}, "Set it to leave_one_out or authors."),
        (vicreg, {"form": "author"}, "Set it to leave_one_out or authors."),
        (barlow_twins, {"standardize": "per-view"}, "Set it to per_view or joint."),
        (barlow_twins, {"redundancy_weight": -1.0}, "Set it to auto or to a finite number of 0 or more."),
        (vicreg, {"covariance_weight": float("nan")}, "Set it to auto or to a finite number of 0 or more."),
        (vicreg, {"variance_weight": "Auto"}, "Set it to auto or to a finite number of 0 or more."),
    ],
)
def test_a_misspelled_form_and_a_negative_weight_are_refused(loss: Any, arguments: dict[str, Any], fix: str) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(UserError) as error:
        loss(torch.randn(2, 4, 3), **arguments)
    assert error.value.what == f"{name} is {value!r}."
    assert error.value.fix == fix


@pytest.mark.parametrize(
    ("embeddings", "named"),
    [
        ([torch.randn(4, 3)] * 2, "a list, not a tensor"),
        (torch.ones(2, 4, 3, dtype=torch.int64), "are int64"),
        (torch.randn(2, 4, 3, dtype=torch.complex64), "are complex64"),
        (torch.randn(2, 4, 0), "compares views"),
    ],
)
def test_what_is_no_embedding_is_refused(loss: Any, embeddings: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        loss(embeddings)


@pytest.mark.parametrize(
    "arguments", [{"seed": 0.5}, {"seed": None}, {"slices": 0}, {"slices": 1.5}, {"sigreg_weight": "x"}]
)
def test_sigreg_names_a_wrong_argument(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(arguments))} is"):
        sigreg(torch.randn(2, 4, 3), **{"seed": 0} | arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    z = torch.randn(2, 4, 3)
    plain = sigreg(z, seed=3, sigreg_weight=0.25, slices=4)["loss"]
    assert sigreg(z, seed=np.int64(3), sigreg_weight=np.float32(0.25), slices=np.int64(4))["loss"] == plain


def test_the_rule_of_a_misspelled_form_is_refused() -> None:
    with pytest.raises(UserError, match="form is 'author'"):
        redundancy_rule(64, 2, form=cast(Any, "author"))
