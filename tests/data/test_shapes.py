"""The embedded data: a function of (seed, index), balanced, hard for raw pixels, indifferent to color."""

import numpy as np

from fastssl.data.sources import shapes


def raw_knn_pct(train_NHWC, train_labels_N, test_MHWC, test_labels_M, k=20):
    train_NF = train_NHWC.reshape(len(train_NHWC), -1).astype(np.float32)
    test_MF = test_MHWC.reshape(len(test_MHWC), -1).astype(np.float32)
    mean_F = train_NF.mean(0)
    train_NF, test_MF = train_NF - mean_F, test_MF - mean_F
    train_NF /= np.linalg.norm(train_NF, axis=1, keepdims=True)
    test_MF /= np.linalg.norm(test_MF, axis=1, keepdims=True)
    similarity_MN = test_MF @ train_NF.T
    nearest_Mk = np.argsort(-similarity_MN, axis=1)[:, :k]
    weights_Mk = np.exp(np.take_along_axis(similarity_MN, nearest_Mk, 1) / 0.07)
    votes_MC = np.stack([(weights_Mk * (train_labels_N[nearest_Mk] == c)).sum(1) for c in range(10)], 1)
    return 100 * float((votes_MC.argmax(1) == test_labels_M).mean())


def test_any_slice_is_the_same_as_in_the_whole():
    whole, labels = shapes.images(60, 24, seed=3)
    part, part_labels = shapes.images(20, 24, seed=3, start=25)
    np.testing.assert_array_equal(part, whole[25:45])
    np.testing.assert_array_equal(part_labels, labels[25:45])


def test_seeds_name_different_sets_and_none_is_special():
    seeds = (0, 1, -1, 2**63, 2**64 - 2)
    sets = [shapes.images(10, 16, seed=seed)[0].tobytes() for seed in seeds]
    assert len(set(sets)) == len(seeds)


def test_dtype_shape_and_balance():
    for side_px in (1, 7, 32, 96):
        images, labels = shapes.images(30, side_px, seed=0)
        assert images.shape == (30, side_px, side_px, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, 3))
    assert shapes.images(0, 32, seed=0)[0].shape == (0, 32, 32, 3)
    assert list(shapes.CLASSES) == sorted(shapes.CLASSES)


def test_color_does_not_tell_the_class():
    images, labels = shapes.images(4000, 16, seed=5)
    color_N3 = images.reshape(len(images), -1, 3).mean(1)
    class_means = np.stack([color_N3[labels == c].mean(0) for c in range(10)])
    nearest = ((color_N3[:, None] - class_means) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() < 0.2  # chance is 0.1


def test_every_shape_stands_out_from_its_background():
    images, _ = shapes.images(500, 32, seed=2)
    luma = images @ np.array([0.299, 0.587, 0.114])
    edge = np.abs(np.diff(luma, axis=2)).reshape(500, -1)
    assert np.quantile(np.sort(edge, axis=1)[:, -15:].mean(1), 0.01) > 40  # of 255


def test_raw_pixels_are_a_poor_guide():
    train, train_labels = shapes.images(4000, 32, seed=1)
    test, test_labels = shapes.images(500, 32, seed=2)
    assert raw_knn_pct(train, train_labels, test, test_labels) < 30
