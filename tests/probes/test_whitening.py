"""Whitened features against SciPy's root of the covariance; kNN of them sees what a strong useless direction hides."""

import numpy as np
import pytest
import torch

from fastssl.probes import evaluate, table, whitening
from fastssl.probes.evaluate import Labeled
from fastssl.probes.whitening import whitened


def skewed(rows: int, *, seed: int) -> torch.Tensor:
    """Correlated features of very different sizes, far from the origin."""
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([100, 10, 1, 1, 0.1, 0.01])
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) @ mix + 30


TRAIN, TEST = skewed(500, seed=1), skewed(40, seed=2)


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 1.0])
def test_it_is_the_inverse_root_of_the_standardized_covariance(shrinkage, monkeypatch):
    from scipy.linalg import sqrtm  # here: it takes long to import, in every process of pytest

    monkeypatch.setattr(whitening, "CHUNK_ROWS", 64)
    x, y = TRAIN.double().numpy(), TEST.double().numpy()
    x, y = ((part - TRAIN.double().numpy().mean(0)) / TRAIN.double().numpy().std(0) for part in (x, y))
    matrix = np.linalg.inv(sqrtm(np.cov(x.T, bias=True) + shrinkage * np.eye(6)))  # the mean eigenvalue is 1
    for found, expected in zip(whitened(TRAIN, TEST, shrinkage=shrinkage), (x @ matrix, y @ matrix), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_train_has_the_identity_as_covariance_and_the_mean_zero():
    train, _ = whitened(TRAIN, TEST, shrinkage=0)
    torch.testing.assert_close(train.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.T @ train / len(train), torch.eye(6), rtol=0, atol=1e-4)


def test_test_does_not_change_how_it_is_whitened():
    _, alone = whitened(TRAIN, TEST[:1])
    _, among = whitened(TRAIN, torch.cat([TEST[:1], 1000 * TEST]))
    torch.testing.assert_close(alone[0], among[0])


def test_fewer_images_than_features_and_repeated_features_are_borne():
    wide = torch.cat([TRAIN[:4], TRAIN[:4]], dim=1)
    assert all(part.isfinite().all() for part in whitened(wide, wide))


def test_neighbors_of_whitened_features_tell_classes_apart_that_a_strong_direction_hides():
    labels = torch.arange(400) % 2
    noise = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 8.0, 0.2])
    features = noise + torch.stack([torch.zeros(400), torch.zeros(400), labels * 2.0], dim=1)
    mixed = features @ torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.5], [0.0, 1.0, 0.0]])  # no single feature shows it
    labeled = Labeled(mixed[:300], labels[:300], mixed[300:], labels[300:], knn_k=(5, 20), whitened_knn=True)
    found = table.accuracies(labeled, names=["knn", "whitened_knn"])
    assert found["knn5_pct"] < 75
    assert found["whitened_knn5_pct"] > 90
    assert list(found) == ["knn5_pct", "knn20_pct", "whitened_knn5_pct", "whitened_knn20_pct"]


def test_without_asking_there_is_no_such_accuracy_and_a_capped_k_is_said_once():
    labels = torch.arange(40) % 20
    plain = Labeled(TEST, labels, TEST, labels)
    assert not whitening.knn_accuracies(plain)
    found = table.accuracies(Labeled(TEST, labels, TEST, labels, whitened_knn=True), names=["knn", "whitened_knn"])
    assert found["whitened_knn20_used"] == found["knn20_used"] == 2
    assert len(table.remarks(found)) == 2  # k = 20 and 200
    assert table.label_of("test_whitened_knn20_pct") == "whitened kNN (k = 20)"
    assert evaluate.knn(*plain.parts, ks=(2,))["knn2_pct"] == found["knn20_pct"]


@pytest.mark.parametrize(("rows", "said"), [(12, False), (11, True), (3, True)])
def test_too_few_images_for_the_features_are_said(rows, said):
    labels = torch.arange(rows) % 2
    found = table.accuracies(Labeled(TRAIN[:rows], labels, TEST, torch.arange(40) % 2, knn_k=(1,), whitened_knn=True))
    remarks = [text for text in table.remarks(found).values() if "Whitened" in text]
    assert bool(remarks) == said
    assert found.get("whitened_images_per_feature") == (rows / 6 if said else None)
    assert not said or f"{rows / 6:.2g} times as many images as features" in remarks[0]
