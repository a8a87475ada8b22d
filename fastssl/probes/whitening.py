"""Whitened features: without correlations and all of one variance, so that no direction counts more in a distance.

Pretrained features vary far more in some directions than in others, and those decide which neighbors are near, whether
or not they tell classes apart.

N training images, M test images, F features.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastssl.probes import evaluate

CHUNK_ROWS = 4096
SHRINKAGE = 1e-2  # of the mean variance of a direction, added to each: weak ones are not blown up
ENOUGH = 2  # images for every feature: with fewer, the weak directions of the covariance are mostly chance


def knn_accuracies(labeled: evaluate.Labeled) -> dict[str, float]:
    """kNN of whitened features, where it is asked for: {"whitened_knn20_pct": ...}, otherwise as kNN.

    Fewer than ENOUGH images for every feature are there as "whitened_images_per_feature".
    """
    if not labeled.whitened_knn:
        return {}
    evaluate.check(*labeled.parts)
    train_NF, test_MF = whitened(labeled.train_NF, labeled.test_MF)
    measured = evaluate.knn_accuracies(replace(labeled, train_NF=train_NF, test_MF=test_MF))
    per_feature = len(train_NF) / train_NF.shape[1]
    few = {"whitened_images_per_feature": per_feature} if per_feature < ENOUGH else {}
    return {f"whitened_{key}": value for key, value in measured.items()} | few


def whitened(train_NF: Tensor, test_MF: Tensor, *, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Both as (x - mean) C^(-1/2), with the mean and the covariance C of train's standardized features.

    Distances and, about the mean, cosines are then those of Mahalanobis. No label is used. Constant features give 0.

    Args:
        train_NF, test_MF: features, any float dtype, finite, one device.
        shrinkage: of the covariance, relative to the mean of its eigenvalues, >= 0.

    Returns:
        float32 on the same device.
    """
    device = train_NF.device
    work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    train_NF, test_MF = train_NF.to(work), test_MF.to(work)
    sums = [part.double().sum(0) for part in torch.split(train_NF, CHUNK_ROWS)]
    mean_F = torch.stack(sums).sum(0) / len(train_NF)
    moments_FF = mean_F.new_zeros(len(mean_F), len(mean_F))
    for part in torch.split(train_NF, CHUNK_ROWS):
        centered = part.double() - mean_F
        moments_FF.addmm_(centered.T, centered)
    variance_F = moments_FF.diagonal() / len(train_NF)
    scale_F = torch.where(variance_F > 0, variance_F, 1).rsqrt()
    correlation_FF = moments_FF / len(train_NF) * scale_F * scale_F[:, None]
    values_F, directions_FF = torch.linalg.eigh(correlation_FF)
    values_F = values_F.clamp_min(0) + shrinkage * values_F.mean()
    root_F = torch.where(values_F > 0, values_F, 1).rsqrt()
    matrix_FF = scale_F[:, None] * (directions_FF * root_F @ directions_FF.T)

    def applied(x_BF: Tensor) -> Tensor:
        parts = [((part.double() - mean_F) @ matrix_FF).float() for part in torch.split(x_BF, CHUNK_ROWS)]
        return torch.cat(parts).to(device)

    return applied(train_NF), applied(test_MF)
