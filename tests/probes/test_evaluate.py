"""kNN, ridge and the probe against loops, scikit-learn and plain PyTorch; choices never see test."""

from functools import partial

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.probes import evaluate, table, whitening
from fastssl.probes.evaluate import _moments, few_labels, hold_out, interval_pct, knn, knn_predict, linear_probe, ridge

QUICK = {"epochs": 3, "batch_size": 64}


def blobs(rows: int, *, seed: int, dims: int = 12, classes: int = 5, noise: float = 1.6) -> tuple[Tensor, Tensor]:
    """Overlapping classes far from the origin, so that centering and the choice of k matter."""
    centers = torch.randn(classes, dims, generator=torch.Generator().manual_seed(0)) + 5
    labels = torch.arange(rows) % classes
    spread = torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))
    return centers[labels] + noise * spread, labels


TRAIN, TEST = blobs(400, seed=1), blobs(150, seed=2)


def whitened_knn(*parts: Tensor) -> dict[str, float]:
    return whitening.knn_accuracies(evaluate.Labeled(*parts, knn_k=(5,), whitened_knn=True))


PROBES = {
    "knn": partial(knn, ks=(5,)),
    "whitened kNN": whitened_knn,
    "ridge": ridge,
    "linear": partial(linear_probe, **QUICK),
}


@pytest.fixture(params=PROBES.values(), ids=PROBES.keys())
def probe(request):
    return request.param


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_equals_the_loop(k):
    train, test = blobs(60, seed=1), blobs(25, seed=2)
    slow = reference.knn(train[0].tolist(), train[1].tolist(), test[0].tolist(), k, 0.07)
    fast = knn_predict(train[0], train[1], test[0], ks=(k,), temperature=0.07)[k]
    assert fast.tolist() == slow


def test_knn_equals_scikit_learn_across_chunks(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_ROWS", 64)
    mean = TRAIN[0].mean(0)
    from sklearn.neighbors import KNeighborsClassifier  # here: it takes long to import, in every process of pytest

    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(TRAIN[0] - mean, TRAIN[1])
    expected = theirs.predict(TEST[0] - mean)
    fast = knn_predict(*TRAIN, TEST[0], ks=(20, 200), temperature=0.07)
    assert (fast[20].numpy() == expected).all()
    assert knn(*TRAIN, *TEST)["knn20_pct"] == pytest.approx(100 * (expected == TEST[1].numpy()).mean())
    assert (fast[20] != fast[200]).any()


def test_more_neighbors_than_images_means_all():
    train = TRAIN[0][:30], TRAIN[1][:30]
    found = knn(*train, *TEST, ks=(30, 200))
    assert found["knn30_pct"] == found["knn200_pct"]


def test_a_low_temperature_does_not_overflow_and_ends_in_the_nearest():
    cold = knn_predict(*TRAIN, TEST[0], ks=(20,), temperature=1e-4)[20]
    assert torch.equal(cold, knn_predict(*TRAIN, TEST[0], ks=(1,), temperature=0.07)[1])
    train, test = blobs(60, seed=1), blobs(25, seed=2)
    doubles = [x.double().tolist() for x in (train[0], test[0])]
    slow = reference.knn(doubles[0], train[1].tolist(), doubles[1], 20, 0.009)  # exp(1 / 0.009) is 1e48
    assert knn_predict(*train, test[0], ks=(20,), temperature=0.009)[20].tolist() == slow


@pytest.mark.parametrize("exponent", [-400, -100, 100, 120, 500])
@pytest.mark.parametrize("name", ["knn", "whitened kNN", "ridge"])
def test_features_of_any_size_are_judged_alike(name, exponent):
    kind = torch.float32 if abs(exponent) < 126 else torch.float64
    scaled = [(x.to(kind) * 2.0**exponent, y) for x, y in (TRAIN, TEST)]
    assert PROBES[name](*scaled[0], *scaled[1]) == PROBES[name](*TRAIN, *TEST)


def test_ridge_equals_scikit_learn():
    (x, y), (x_test, y_test) = TRAIN, TEST
    centered = (x - x.mean(0)).double()
    strength = 0.3
    mean_eigenvalue = float(centered.square().sum() / x.shape[1])
    from sklearn.linear_model import Ridge  # here: it takes long to import, in every process of pytest

    theirs = Ridge(alpha=strength * mean_eigenvalue).fit(x.double(), torch.eye(5)[y].double())
    expected = theirs.predict(x_test.double()).argmax(1)
    found = ridge(x, y, x_test, y_test, strengths=(strength,))
    assert found == {
        "ridge_pct": pytest.approx(100 * (expected == y_test.numpy()).mean()),
        "ridge_strength": strength,
    }


def test_ridge_chooses_what_the_held_out_part_prefers():
    (x, y), classes = TRAIN, torch.eye(5)
    x = torch.cat([x, torch.randn(400, 150, generator=torch.Generator().manual_seed(4))], 1)  # noise to overfit
    x_test = torch.cat([TEST[0], torch.zeros(150, 150)], 1)
    fit, held = hold_out(y, 0.1, seed=0)
    scores = {}
    for strength in evaluate.RIDGE_STRENGTHS:
        centered = (x - x.mean(0)).double()
        alpha = strength * float(centered[fit].square().sum() / x.shape[1])
        from sklearn.linear_model import Ridge  # here: it takes long to import, in every process of pytest

        theirs = Ridge(alpha=alpha, fit_intercept=False).fit(centered[fit], (classes[y] - classes[y].mean(0))[fit])
        guess = theirs.predict(centered[held]) + classes[y].mean(0).numpy()
        scores[strength] = (guess.argmax(1) == y[held].numpy()).mean()
    chosen = ridge(x, y, x_test, TEST[1])["ridge_strength"]
    assert scores[chosen] == max(scores.values())
    assert min(scores.values()) < max(scores.values())


def test_choices_never_see_test(probe):
    shuffled = TEST[1][torch.randperm(150, generator=torch.Generator().manual_seed(3))]
    several = {"learning_rates": (1e-4, 3e-2), "epochs": 20} if probe is PROBES["linear"] else {}
    plain, blind = probe(*TRAIN, *TEST, **several), probe(*TRAIN, TEST[0], shuffled, **several)
    accuracy, *choice = plain
    assert plain[accuracy] > blind[accuracy] + 20
    assert [plain[c] for c in choice] == [blind[c] for c in choice]


def test_linear_probe_is_adam_on_a_linear_layer():
    (x, y), rate = TRAIN, 3e-3
    weights, biases = evaluate.fit_linear(x, y, learning_rates=(rate,), classes=5, label_smoothing=0.1, seed=7, **QUICK)
    generator = torch.Generator().manual_seed(7)
    start = (torch.rand(13, 5, generator=generator) * 2 - 1) / 12**0.5
    layer = torch.nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(start[:12].T)
        layer.bias.copy_(start[12])
    adam = torch.optim.Adam(layer.parameters(), lr=rate)
    for _ in range(3):
        for rows in torch.randperm(400, generator=generator).split(64):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), y[rows], label_smoothing=0.1).backward()
            adam.step()
    torch.testing.assert_close(weights[0], layer.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(biases[0], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_learning_rates_side_by_side_are_each_their_own():
    fit = partial(evaluate.fit_linear, *TRAIN, classes=5, label_smoothing=0.1, seed=0, **QUICK)
    rates = (1e-4, 1e-3, 1e-2)
    together = fit(learning_rates=rates)
    for i, rate in enumerate(rates):
        alone = fit(learning_rates=(rate,))
        torch.testing.assert_close(together[0][i], alone[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][i], alone[1][0], rtol=1e-4, atol=1e-5)


def test_a_useless_learning_rate_is_not_chosen():
    found = linear_probe(*TRAIN, *TEST, learning_rates=(1e-9, 3e-2), epochs=20, batch_size=64)
    assert found["linear_lr"] == 3e-2


def test_where_nothing_can_be_held_out_the_usual_values_are_taken_and_named():
    x, y = torch.eye(5).repeat_interleave(4, 1), torch.arange(5)
    linear = linear_probe(x, y, x, y, learning_rates=(1e-4, 1e-3, 3e-2), epochs=1)
    assert (linear["linear_lr"], linear["linear_unchosen"]) == (1e-3, 1)
    found = ridge(x, y, x, y)
    assert (found["ridge_strength"], found["ridge_unchosen"]) == (1e-2, 1)
    assert len(table.remarks(linear | found)) == 2
    assert not {"linear_unchosen", "ridge_unchosen"} & {*linear_probe(*TRAIN, *TEST, epochs=1), *ridge(*TRAIN, *TEST)}


def test_every_probe_repeats_itself(probe):
    assert probe(*TRAIN, *TEST) == probe(*TRAIN, *TEST)


def test_every_probe_is_good_where_classes_are_apart(probe):
    train, test = blobs(400, seed=1, noise=0.3), blobs(100, seed=2, noise=0.3)
    long = {"learning_rates": (3e-2,), "epochs": 20} if probe is PROBES["linear"] else {}
    found = probe(*train, *test, **long)
    assert next(iter(found.values())) > 98


def test_half_precision_features_are_taken(probe):
    found = probe(TRAIN[0].bfloat16(), TRAIN[1], TEST[0].bfloat16(), TEST[1])
    plain = probe(*TRAIN, *TEST)
    accuracy = next(iter(found))
    assert found[accuracy] == pytest.approx(plain[accuracy], abs=3)


@pytest.mark.parametrize(
    ("part", "spoil", "what"),
    [
        ("train", lambda x, y: (x, torch.full_like(y, -1)), "400 of 400 train images have no label"),
        ("test", lambda x, y: (x, torch.where(y == 0, -1, y)), "30 of 150 test images have no label"),
        ("test", lambda x, y: (x, torch.where(y == 0, 9, y)), "classes that train lacks: 9"),
        ("train", lambda x, y: (x * float("nan"), y), "train features are not all finite"),
        ("test", lambda x, y: (x[:0], y[:0]), "test part has 0 feature rows"),
        ("train", lambda x, y: (x[:7], y), "7 feature rows and 400 labels"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(probe, part, spoil, what):
    train, test = (spoil(*TRAIN), TEST) if part == "train" else (TRAIN, spoil(*TEST))
    with pytest.raises(UserError, match=what) as error:
        probe(*train, *test)
    assert error.value.fix


def test_ridge_and_probe_bear_constant_features():
    x, y = torch.ones(40, 3), torch.arange(40) % 2
    assert ridge(x, y, x, y)["ridge_pct"] == 50
    assert linear_probe(x, y, x, y, **QUICK)["linear_pct"] == 50
    assert knn(x, y, x, y, ks=(5,))["knn5_pct"] == 50


@pytest.mark.parametrize(("share", "each"), [(0.1, 8), (0.001, 1), (1.0, 80)])
def test_few_labels_keep_every_class_in_proportion(share, each):
    kept = few_labels(TRAIN[1], share, seed=3)
    assert TRAIN[1][kept].bincount().tolist() == [each] * 5
    assert (kept.diff() > 0).all()
    assert torch.equal(kept, few_labels(TRAIN[1], share, seed=3))
    assert share == 1.0 or not torch.equal(kept, few_labels(TRAIN[1], share, seed=4))


def test_hold_out_parts_the_set():
    labels = torch.cat([TRAIN[1], torch.tensor([7])])  # one image of class 7 stays in the fitted part
    fit, held = hold_out(labels, 0.1, seed=0)
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(401))
    assert labels[held].bincount().tolist() == [8] * 5


def test_intervals_are_close_to_a_bootstrap_over_images():
    right = np.arange(500) < 400
    picks = np.random.default_rng(1).integers(0, 500, (4000, 500))
    expected = np.quantile(100 * right[picks].mean(1), [0.025, 0.975])
    assert interval_pct(80.0, 500) == pytest.approx(expected, abs=0.4)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 20), (20, 20), (1, 7), (13, 40), (400, 500)])
def test_intervals_are_the_accuracies_that_a_score_test_does_not_reject(right: int, count: int):
    share, p = right / count, np.linspace(1e-6, 1 - 1e-6, 2_000_001)
    kept = p[np.abs(share - p) <= 1.959964 * np.sqrt(p * (1 - p) / count)]  # Wilson 1927, by search
    assert interval_pct(100 * share, count) == pytest.approx((100 * kept.min(), 100 * kept.max()), abs=1e-3)


def test_moments_by_class_are_those_of_the_dense_one_hot():
    generator = torch.Generator().manual_seed(0)
    x_NF, y_N = torch.randn(9000, 7, generator=generator), torch.randint(0, 5, (9000,), generator=generator)
    onehot_NC = torch.nn.functional.one_hot(y_N, 5).double()
    mean_C = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)
    xx_FF, xy_FC = _moments(x_NF, y_N, mean_C)
    torch.testing.assert_close(xx_FF, x_NF.double().T @ x_NF.double(), rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(xy_FC, x_NF.double().T @ (onehot_NC - mean_C), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", PROBES)
def test_large_labels_change_nothing(name):
    """A dense one-hot of these labels would take terabytes."""
    generator = torch.Generator().manual_seed(0)
    y_N, y_M = torch.arange(120) % 4, torch.arange(40) % 4
    x_NF = torch.randn(120, 6, generator=generator) + y_N[:, None]
    x_MF = torch.randn(40, 6, generator=generator) + y_M[:, None]
    far_C = torch.tensor([3, 1000, 30_000_000, 10**9])
    assert PROBES[name](x_NF, far_C[y_N], x_MF, far_C[y_M]) == PROBES[name](x_NF, y_N, x_MF, y_M)
