"""The theory made visible on a graph small enough to solve exactly: python bench/eigenspace.py

n images stand on a line; an augmentation moves an image up to `reach` places, reflected at the ends. The
augmentation kernel is then a small matrix whose eigenfunctions are cosines, and listing every pair of
augmentations of every image gives the losses of fastssl.losses their exact expectation. A table of
features trained with them must span the top eigenfunctions; a weight that is too low first fills every
feature with the same one. Writes docs/figures/eigenspace.png and bench/results/eigenspace.json.

n images (and states), m augmentations of each, V views, d features, N = n * m^V rows of one full batch.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from fastssl.bench.record import row, write  # noqa: E402
from fastssl.losses import barlow_twins  # noqa: E402
from fastssl.losses.barlow_twins import redundancy_rule  # noqa: E402

IMAGES, REACH = 16, 2
Loss = Callable[[Tensor], Tensor]


def line_graph(images: int = IMAGES, reach: int = REACH) -> Tensor:
    """state_nm int64: the m = 2 reach + 1 equally likely augmentations of each image."""
    moved = torch.arange(images)[:, None] + torch.arange(-reach, reach + 1)
    moved = torch.where(moved < 0, -1 - moved, moved)
    return torch.where(moved >= images, 2 * images - 1 - moved, moved)


def transition(state_nm: Tensor) -> Tensor:
    """A_nn float64: probability that image i (row) is seen as state j; its columns sum to one here too."""
    share = torch.full(state_nm.shape, 1 / state_nm.shape[1], dtype=torch.float64)
    return torch.zeros(len(state_nm), len(state_nm), dtype=torch.float64).scatter_add_(1, state_nm, share)


def eigenfunctions(state_nm: Tensor) -> tuple[Tensor, Tensor]:
    """values_n and functions_nn of the kernel A' A of two views of one image; the constant comes first."""
    A_nn = transition(state_nm)
    values_n, functions_nn = torch.linalg.eigh(A_nn.T @ A_nn)
    return values_n.flip(0), functions_nn.flip(1)


def full_batch(state_nm: Tensor, views: int) -> Tensor:
    """index_VN: every image under every combination of V augmentations, each once."""
    choice_KV = torch.cartesian_prod(*[torch.arange(state_nm.shape[1])] * views)
    return state_nm[:, choice_KV].reshape(-1, views).T


def angle_deg(table_nd: Tensor, functions_nn: Tensor) -> float:
    """Largest principal angle between the features' span and the top d eigenfunctions after the constant."""
    basis_nd = torch.linalg.qr(table_nd - table_nd.mean(0)).Q
    cosine_d = torch.linalg.svdvals(basis_nd.T @ functions_nn[:, 1 : table_nd.shape[1] + 1])
    return float(torch.rad2deg(cosine_d.min().clamp(max=1).acos()))


def similarity(table_nd: Tensor) -> float:
    """Mean absolute correlation of two features: 1 when all are the same."""
    d = table_nd.shape[1]
    return float((torch.corrcoef(table_nd.T).abs().sum() - d) / (d * d - d))


def barlow(weight: float) -> Loss:
    """The default loss at one weight."""
    return lambda z_VND: barlow_twins(
        z_VND, redundancy_weight=weight, form="leave_one_out", standardize="per_view", l2_normalize=False
    )["loss"]


def descend(
    index_VN: Tensor,
    dim: int,
    loss: Loss,
    *,
    steps: int,
    seed: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """table_nd after `steps` of Adam on the exact loss, from a random table; `watch` sees it at every step."""
    generator = torch.Generator().manual_seed(seed)
    images = int(index_VN.max()) + 1
    table_nd = torch.randn(images, dim, generator=generator, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([table_nd], lr=0.02)
    for _ in range(steps):
        if watch is not None:
            watch(table_nd.detach())
        adam.zero_grad()
        loss(table_nd[index_VN]).backward()
        adam.step()
    return table_nd.detach()


def view_mean_error(state_nm: Tensor, function_n: Tensor, views: int, *, draws: int, seed: int = 0) -> float:
    """Mean square distance of the mean over V sampled views from the operator's A f, over images and draws."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(state_nm.shape[1], (draws, len(state_nm), views), generator=generator)
    seen = function_n[state_nm[torch.arange(len(state_nm))[:, None], picks]].mean(-1)
    return float((seen - transition(state_nm) @ function_n).square().mean())


def trajectories(dim: int, weight: float, *, steps: int, seeds: int) -> dict[str, list[list[float]]]:
    """Angle and similarity at every tenth step for each seed, and the last table of the first seed."""
    state_nm = line_graph()
    _, functions_nn = eigenfunctions(state_nm)
    found: dict[str, list[list[float]]] = {"angle_deg": [], "similarity": [], "table": []}
    for seed in range(seeds):
        tables: list[Tensor] = []
        watch = lambda table, kept=tables: kept.append(table.clone())  # noqa: E731
        last = descend(full_batch(state_nm, 2), dim, barlow(weight), steps=steps, seed=seed, watch=watch)
        found["angle_deg"].append([angle_deg(t, functions_nn) for t in [*tables[::10], last]])
        found["similarity"].append([similarity(t) for t in [*tables[::10], last]])
        found["table"] = found["table"] or last.T.tolist()
    return found


def draw(path: Path, curves: dict[str, dict], errors: dict[int, float], exact: float, dim: int) -> None:
    """Four panels: the eigenfunctions learned, by weight; angle; similarity; the V-view mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    colors = dict(zip(curves, ("#c44e52", "#dd8452", "#1f6f8b"), strict=True))
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    _, functions_nn = eigenfunctions(line_graph())
    for k in range(1, dim + 1):
        axes[0, 0].plot(functions_nn[:, k], color="0.25", alpha=1 - 0.18 * (k - 1), lw=1.6)
    axes[0, 0].set_title(f"the kernel's top {dim} eigenfunctions")
    for axis, (name, found) in zip((axes[0, 1], axes[0, 2]), (list(curves.items())[i] for i in (0, -1)), strict=True):
        for feature in found["table"]:
            row_n = torch.tensor(feature) - torch.tensor(feature).mean()
            row_n = row_n * torch.sign(row_n @ functions_nn[:, 1].to(row_n)) / row_n.norm()  # a sign means nothing
            axis.plot(row_n, color=colors[name], alpha=0.8, lw=1.6)
        axis.set_title(f"features learned, {name}")
    for axis in axes[0]:
        axis.set(xlabel="image along the line", ylabel="value", ylim=(-0.72, 0.72), xticks=range(0, IMAGES, 5))
    for axis, key, title in (
        (axes[1, 0], "angle_deg", "largest principal angle to them, degrees"),
        (axes[1, 1], "similarity", "mean |correlation| of two features"),
    ):
        for name, found in curves.items():
            values = torch.tensor(found[key])
            at = 10 * torch.arange(values.shape[1])
            axis.plot(at, values.median(0).values, color=colors[name], lw=1.8, label=name)
            axis.fill_between(at, values.amin(0), values.amax(0), color=colors[name], alpha=0.15, lw=0)
        axis.set(title=title, xlabel="step")
    axes[1, 0].set_ylim(0, 92)
    axes[1, 1].set_ylim(0, 1.02)
    axes[1, 1].legend(frameon=False)
    views = sorted(errors)
    axes[1, 2].loglog(views, [exact / v for v in views], color="0.6", lw=1.2, label="variance / V")
    axes[1, 2].loglog(views, [errors[v] for v in views], "o", color="#1f6f8b", label="measured")
    axes[1, 2].set_xticks(views, [str(v) for v in views], minor=False)
    axes[1, 2].minorticks_off()
    axes[1, 2].set(title="error of the V-view mean", xlabel="views V", ylabel="mean square distance to T f")
    axes[1, 2].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/eigenspace.png")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/eigenspace.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors of a few hundred rows: a second thread only waits
    rule = redundancy_rule(args.dim, 2)
    weights = {"weight 0.0051": 0.0051, "weight 0.1": 0.1, f"weight {rule:.2g}, the rule's": rule}
    curves = {n: trajectories(args.dim, w, steps=args.steps, seeds=args.seeds) for n, w in weights.items()}
    state_nm = line_graph()
    function_n = eigenfunctions(state_nm)[1][:, 1]
    A_nn = transition(state_nm)
    exact = float((A_nn @ function_n.square() - (A_nn @ function_n).square()).mean())
    errors = {v: view_mean_error(state_nm, function_n, v, draws=4000) for v in (1, 2, 4, 8, 16)}
    draw(args.figure, curves, errors, exact, args.dim)
    rows = [
        row(
            name,
            {"dim": args.dim, "weight": weights[name], "steps": args.steps},
            key,
            [c[-1] for c in found[key]],
        )
        for name, found in curves.items()
        for key in ("angle_deg", "similarity")
    ]
    rows += [
        row("mean of views", {"views": v}, "error_times_v_over_variance", [e * v / exact]) for v, e in errors.items()
    ]
    write(args.json, "eigenspace", rows)


if __name__ == "__main__":
    main()
