"""How good frozen features are: kNN, ridge in closed form, the linear probe, few labels, intervals.

Pure functions of features already extracted, deterministic; accuracies are top-1 in percent. Whatever has
to be chosen (ridge's strength, the probe's learning rate) is chosen on a held-out part of train, never on
test. Formulas and protocol: arXiv 2312.10725 and the kNN of arXiv 1805.01978.

N training images, M test images, F features, C classes, L learning rates, K neighbors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastssl.errors import UserError, option

HELD_OUT_SHARE = 0.1
# Relative to the mean eigenvalue of the features' second moments, so they suit any scale of features.
RIDGE_STRENGTHS = tuple(10.0**p for p in range(-6, 3))
USUAL_STRENGTH, USUAL_RATE = 1e-2, 1e-3  # where nothing can be held out to choose by; the paper's rate
CHUNK_ROWS = 256
LARGEST_EXPONENT = 40  # of two: the sum of 2^40 such squares is still a float32
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Labeled:
    """Features to learn from and to be judged on, and the probes' settings.

    Attributes:
        train_NF, test_MF: features, any float dtype, one device.
        train_labels_N, test_labels_M: int64 classes, none missing.
        knn_k: numbers of neighbors that vote.
        linear_epochs: of the linear probe; 0 skips it.
        learning_rates: of the linear probe; with several, a held-out part of train chooses.
        whitened_knn: also kNN of whitened features.
        progress: called with (what, epochs done, epochs in all) by a probe that takes long.
    """

    train_NF: Tensor
    train_labels_N: Tensor
    test_MF: Tensor
    test_labels_M: Tensor
    knn_k: Sequence[int] = (20, 200)
    linear_epochs: int = 200
    learning_rates: Sequence[float] = (1e-3,)
    whitened_knn: bool = False
    progress: Progress | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.train_NF, self.train_labels_N, self.test_MF, self.test_labels_M


def knn_accuracies(labeled: Labeled) -> dict[str, float]:
    """kNN for each k. One above the images of a class is capped, and the k used is next to it as knn<k>_used."""
    used = {k: capped_k(k, labeled.train_labels_N) for k in labeled.knn_k}
    measured = knn(*labeled.parts, ks=tuple(dict.fromkeys(used.values())))
    return {f"knn{k}_pct": measured[f"knn{capped}_pct"] for k, capped in used.items()} | {
        f"knn{k}_used": float(capped) for k, capped in used.items() if capped != k
    }


def capped_k(k: int, labels_N: Tensor) -> int:
    """At most the mean number of images of a class: beyond it most neighbors must be of other classes."""
    return max(1, min(k, len(labels_N) // max(1, len(torch.unique(labels_N)))))


def ridge_accuracy(labeled: Labeled) -> dict[str, float]:
    """`ridge` with its own candidates."""
    return ridge(*labeled.parts)


def linear_accuracy(labeled: Labeled) -> dict[str, float]:
    """`linear_probe`, where it is asked for."""
    if not labeled.linear_epochs:
        return {}
    return linear_probe(
        *labeled.parts,
        learning_rates=labeled.learning_rates,
        epochs=labeled.linear_epochs,
        progress=labeled.progress,
    )


def knn(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    *,
    ks: Sequence[int] = (20, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Accuracy of the weighted vote of the k nearest training images, {"knn20_pct": ..., "knn200_pct": ...}.

    Args:
        train_NF, test_MF: features, any float dtype, one device.
        train_labels_N, test_labels_M: int64 classes, none missing.
        ks: neighbors that vote; more than N means all N.
        temperature: a neighbor at cosine s weighs exp(s / temperature), > 0.
    """
    check(train_NF, train_labels_N, test_MF, test_labels_M)
    predicted = knn_predict(train_NF, train_labels_N, test_MF, ks=ks, temperature=temperature)
    return {f"knn{k}_pct": top1_pct(predicted_M, test_labels_M) for k, predicted_M in predicted.items()}


def knn_predict(
    train_NF: Tensor, train_labels_N: Tensor, test_MF: Tensor, *, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Each k's predicted classes (M,), by cosine of features centered on the training mean."""
    train_NF, test_MF = in_range(train_NF, test_MF)
    mean_F = train_NF.mean(0)
    train_FN = nnf.normalize(train_NF - mean_F, dim=1).T
    test_MF = nnf.normalize(test_MF - mean_F, dim=1)
    most = min(max(ks), len(train_NF))
    label_C, class_N = torch.unique(train_labels_N, return_inverse=True)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk_BF in torch.split(test_MF, CHUNK_ROWS):
        cosine_BK, nearest_BK = (chunk_BF @ train_FN).topk(most, dim=1)
        # Relative to the nearest: exp(1 / 0.011) is more than float32 holds.
        weight_BK, class_BK = ((cosine_BK - cosine_BK[:, :1]) / temperature).exp(), class_N[nearest_BK]
        for k in ks:
            votes_BC = weight_BK.new_zeros(len(chunk_BF), len(label_C))
            votes_BC.scatter_add_(1, class_BK[:, :k], weight_BK[:, :k])
            predicted[k].append(label_C[votes_BC.argmax(1)])
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def ridge(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    *,
    strengths: Sequence[float] = RIDGE_STRENGTHS,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of least squares on one-hot classes, {"ridge_pct": ..., "ridge_strength": the one chosen}.

    Where no class has two images nothing can be held out; the usual strength is taken, and "ridge_unchosen" says so.

    Args:
        train_NF, train_labels_N, test_MF, test_labels_M: as for `knn`.
        strengths: candidates, relative to the mean eigenvalue of the features' second moments.
        seed: of the part of train held out for the choice.
    """
    check(train_NF, train_labels_N, test_MF, test_labels_M)
    predicted_M, strength = ridge_predict(train_NF, train_labels_N, test_MF, strengths=strengths, seed=seed)
    unchosen = {} if can_hold_out(train_labels_N) else {"ridge_unchosen": 1.0}
    return {"ridge_pct": top1_pct(predicted_M, test_labels_M), "ridge_strength": strength} | unchosen


def ridge_predict(
    train_NF: Tensor, train_labels_N: Tensor, test_MF: Tensor, *, strengths: Sequence[float], seed: int
) -> tuple[Tensor, float]:
    """Predicted classes (M,) and the strength chosen: in float64."""
    device = train_NF.device
    work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    x_NF, x_MF = in_range(train_NF.to(work), test_MF.to(work))
    label_C, y_N = torch.unique(train_labels_N.to(work), return_inverse=True)
    fit, held = hold_out(y_N, HELD_OUT_SHARE, seed=seed)
    mean_F = torch.stack([part.double().sum(0) for part in torch.split(x_NF, 16 * CHUNK_ROWS)]).sum(0) / len(x_NF)
    mean_C = torch.bincount(y_N, minlength=len(label_C)).double() / len(y_N)
    # Moments add up: the whole train is the fitted part plus the part held out, so each row is used once.
    fit_FF, fit_FC = _moments(x_NF[fit] - mean_F.float(), y_N[fit], mean_C)
    held_FF, held_FC = _moments(x_NF[held] - mean_F.float(), y_N[held], mean_C)
    solved = (_solve(fit_FF, fit_FC, strength) for strength in strengths)
    scores = [_predicted(x_NF[held], weight_FC, mean_F, mean_C) for weight_FC in solved]
    best = strengths[int(np.argmax([top1_pct(guess_B, y_N[held]) for guess_B in scores]))]
    if not len(held):
        best = nearest(strengths, USUAL_STRENGTH)
    weight_FC = _solve(fit_FF + held_FF, fit_FC + held_FC, best)
    return label_C[_predicted(x_MF, weight_FC, mean_F, mean_C)].to(device), best


def in_range(train_NF: Tensor, test_MF: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; where squares could leave its range, divided by the power of two next to train's largest."""
    exponent = math.frexp(float(train_NF.abs().max()))[1]
    if abs(exponent) < LARGEST_EXPONENT:
        return train_NF.float(), test_MF.float()
    return (train_NF.double() * 2.0**-exponent).float(), (test_MF.double() * 2.0**-exponent).float()


def _predicted(x_BF: Tensor, weight_FC: Tensor, mean_F: Tensor, mean_C: Tensor) -> Tensor:
    """The class of the largest score of each row, in chunks: all scores of a large set would not fit."""
    parts = [((x - mean_F) @ weight_FC + mean_C).argmax(1) for x in torch.split(x_BF, 16 * CHUNK_ROWS)]
    return torch.cat(parts)


def _solve(xx_FF: Tensor, xy_FC: Tensor, strength: float) -> Tensor:
    """Ridge's weights; the penalty is `strength` times the mean eigenvalue (of one, for constant features)."""
    penalty = strength * (float(xx_FF.diagonal().mean()) or 1.0)
    lower_FF = torch.linalg.cholesky(xx_FF + penalty * torch.eye(len(xx_FF), dtype=xx_FF.dtype, device=xx_FF.device))
    return torch.cholesky_solve(xy_FC, lower_FF)


def linear_probe(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    *,
    learning_rates: Sequence[float] = (1e-3,),
    epochs: int = 200,
    batch_size: int = 512,
    label_smoothing: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Accuracy of a linear classifier trained with Adam, {"linear_pct": ..., "linear_lr": the one chosen}.

    The paper's protocol is the default; the last epoch counts. With several learning rates all classifiers
    train in one pass on nine tenths of train, and the tenth held out chooses among them; where no class has
    two images the one nearest to the paper's 0.001 is taken, and "linear_unchosen" says so.

    Args:
        train_NF, train_labels_N, test_MF, test_labels_M: as for `knn`.
        learning_rates: Adam's, > 0.
        epochs, batch_size: passes over train, images per step.
        label_smoothing: share of the target spread evenly over classes, [0, 1).
        seed: of initial weights, order and the part held out.
        progress: called with ("linear probe", epochs done, epochs in all).
    """
    check(train_NF, train_labels_N, test_MF, test_labels_M)
    x_NF = train_NF.float()
    label_C, y_N = torch.unique(train_labels_N, return_inverse=True)
    held = fit = torch.arange(len(y_N), device=y_N.device)
    if len(learning_rates) > 1:
        fit, held = hold_out(y_N, HELD_OUT_SHARE, seed=seed)
    weight_LFC, bias_LC = fit_linear(
        x_NF[fit],
        y_N[fit],
        learning_rates=learning_rates,
        classes=len(label_C),
        epochs=epochs,
        batch_size=batch_size,
        label_smoothing=label_smoothing,
        seed=seed,
        progress=progress,
    )
    chosen, unchosen = 0, len(learning_rates) > 1 and not len(held)
    if unchosen:
        chosen = learning_rates.index(nearest(learning_rates, USUAL_RATE))
    elif len(learning_rates) > 1:
        guesses = [(x_NF[held] @ w + b).argmax(1) for w, b in zip(weight_LFC, bias_LC, strict=True)]
        chosen = int(np.argmax([top1_pct(g, y_N[held]) for g in guesses]))
    predicted_M = label_C[(test_MF.float() @ weight_LFC[chosen] + bias_LC[chosen]).argmax(1)]
    accuracy = {"linear_pct": top1_pct(predicted_M, test_labels_M), "linear_lr": float(learning_rates[chosen])}
    return accuracy | ({"linear_unchosen": 1.0} if unchosen else {})


def fit_linear(
    x_NF: Tensor,
    y_N: Tensor,
    *,
    learning_rates: Sequence[float],
    classes: int,
    epochs: int,
    batch_size: int,
    label_smoothing: float,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights (L, F, C) and biases (L, C), one classifier per learning rate, sharing every batch and matmul."""
    generator = torch.Generator().manual_seed(seed)
    F, L = x_NF.shape[1], len(learning_rates)
    start_FC = (torch.rand(F + 1, classes, generator=generator) * 2 - 1) / F**0.5  # as nn.Linear, bias last
    heads = [start_FC.to(x_NF.device, copy=True).requires_grad_() for _ in learning_rates]
    groups = [{"params": [h], "lr": lr} for h, lr in zip(heads, learning_rates, strict=True)]
    adam = torch.optim.Adam(groups)
    for epoch in range(epochs):
        order_N = torch.randperm(len(x_NF), generator=generator).to(x_NF.device)
        for rows in torch.split(order_N, batch_size):
            table = torch.cat(heads, 1)
            score_MC = (x_NF[rows] @ table[:F] + table[F]).view(-1, classes)  # M = B L; CUDA's kernel for more
            goal_M = y_N[rows].repeat_interleave(L, output_size=L * len(rows))  # dimensions is not deterministic
            # Summed over L, so that each classifier's gradient is its own.
            loss = L * nnf.cross_entropy(score_MC, goal_M, label_smoothing=label_smoothing)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        if progress:
            progress("linear probe", epoch + 1, epochs)
    table_LFC = torch.stack(heads).detach()
    return table_LFC[:, :F], table_LFC[:, F]


def few_labels(labels_N: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Sorted positions of a share of the labels, each class in proportion and with at least one.

    Args:
        labels_N: int64 classes.
        share: (0, 1], such as 0.01 or 0.1.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in torch.unique(labels_N):
        rows = (labels_N == label).nonzero()[:, 0]
        count = max(1, round(share * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)])
    return torch.cat(chosen).sort().values


def hold_out(labels_N: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and positions held out; a class with one image stays in the fitted part."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels_N), dtype=torch.bool, device=labels_N.device)
    for label in torch.unique(labels_N):
        rows = (labels_N == label).nonzero()[:, 0]
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        held[rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def can_hold_out(labels_N: Tensor) -> bool:
    """Whether some class has two images."""
    return len(torch.unique(labels_N)) < len(labels_N)


def nearest(candidates: Sequence[float], usual: float) -> float:
    """The candidate nearest to a positive number, in the logarithm."""
    return min(candidates, key=lambda value: abs(math.log(value / usual)))


def top1_pct(predicted_M: Tensor, labels_M: Tensor) -> float:
    """Share of right predictions in percent; 0 for none at all."""
    return 100.0 * float((predicted_M == labels_M).double().mean()) if len(labels_M) else 0.0


def interval_pct(accuracy_pct: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a top-1 accuracy over the test images, in percent.

    A bootstrap over the images gives the same for many of them, but no width at all where all are right or all wrong.

    Args:
        accuracy_pct: measured on `count` images.
        level: share of such intervals that hold the accuracy on all images of this kind.
    """
    share, z = accuracy_pct / 100, NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 / (1 + z**2 / count)
    center = shrink * (share + z**2 / (2 * count))
    half = shrink * z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, 100 * (center - half)), min(100.0, 100 * (center + half))


def check(train_NF: Tensor, train_labels_N: Tensor, test_MF: Tensor, test_labels_M: Tensor) -> None:
    """Refuse what cannot be evaluated: nothing there, labels missing, classes unseen, features not finite."""
    for name, rows, labels in (("train", train_NF, train_labels_N), ("test", test_MF, test_labels_M)):
        if len(rows) == 0 or len(rows) != len(labels):
            raise UserError(
                f"The {name} part has {len(rows)} feature rows and {len(labels)} labels.",
                "Give as many labels as images, and at least one.",
            )
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"The {name} features are not all finite.",
                "Evaluate an earlier checkpoint; this one diverged.",
            )
    check_labels(train_labels_N, test_labels_M)


def check_labels(train_labels_N: Tensor, test_labels_M: Tensor) -> None:
    """Refuse missing labels and classes unseen in train."""
    for name, labels in (("train", train_labels_N), ("test", test_labels_M)):
        if missing := int((labels < 0).sum()):
            raise UserError(
                f"{missing} of {len(labels)} {name} images have no label (-1).",
                f"Evaluate on labeled sets: data.probe_path and data.test_path, "
                f"or {option('data')} and {option('test')} of an evaluation.",
            )
    unseen = sorted(set(test_labels_M.tolist()) - set(train_labels_N.tolist()))
    if unseen:
        raise UserError(
            f"The test set has classes that train lacks: {', '.join(map(str, unseen[:10]))}.",
            "Evaluate with a train split that holds every class of the test split.",
        )


def _moments(x_NF: Tensor, y_N: Tensor, mean_C: Tensor) -> tuple[Tensor, Tensor]:
    """x'x and x'(onehot - mean) in float64, in chunks, the latter from the sums of x by class."""
    F, C, rows = x_NF.shape[1], len(mean_C), 16 * CHUNK_ROWS
    xx, sums_CF = x_NF.new_zeros(F, F, dtype=torch.float64), x_NF.new_zeros(C, F, dtype=torch.float64)
    for x, y in zip(torch.split(x_NF, rows), torch.split(y_N, rows), strict=True):
        xx.addmm_(x.double().T, x.double())
        sums_CF.index_add_(0, y, x.double())
    return xx, sums_CF.T - sums_CF.sum(0)[:, None] * mean_C
