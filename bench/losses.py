"""Time and peak memory of the losses, forward and backward: python bench/losses.py

Rows: fastssl for V = 2 to 16 views, its D x D product as data parallelism needs it, all pairs of views with
the two-view formula, and lightly's two-view losses when installed. Every configuration is visited once a
round, so that a slow moment of the machine does not fall on one of them alone; memory is what autograd and
the formula allocate beyond the embeddings and their gradient. Writes bench/results/losses.json.

lightly's losses need torch alone, so they can be had without touching the environment's other packages:
    pip install --no-deps --target build/peers lightly
    PYTHONPATH=build/peers python bench/losses.py

V views, B images, D dimensions.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from fastssl import losses  # noqa: E402
from fastssl.bench.record import row, write  # noqa: E402
from fastssl.training import guards  # noqa: E402

Loss = Callable[[Tensor], Tensor]
LAMBDA = 0.0051
METRICS = ("ms", "cpu_ms", "peak_mb")
BOTH_ORDERS = (  # why a loss for two views alone may be faster
    "one formula for any V: of two views it forms the products in both orders, where a loss for two needs one"
)
barlow = partial(losses.barlow_twins, form="leave_one_out", standardize="per_view", l2_normalize=False)
vicreg = partial(losses.vicreg, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0)


def ours(z_VBD: Tensor) -> Tensor:
    return barlow(z_VBD, redundancy_weight=LAMBDA)["loss"]


def ours_over_ranks(z_VBD: Tensor) -> Tensor:
    """As under data parallelism: any sum but `identity` takes the D x D product."""
    return barlow(z_VBD, redundancy_weight=LAMBDA, all_sum=lambda x: x)["loss"]


def ours_vicreg(z_VBD: Tensor) -> Tensor:
    return vicreg(z_VBD)["loss"]


def ours_sigreg(z_VBD: Tensor) -> Tensor:
    return losses.sigreg(z_VBD, seed=0)["loss"]


def all_pairs(z_VBD: Tensor) -> Tensor:
    """The two-view loss averaged over every pair of views, each view standardized once."""
    z_VBD = (z_VBD - z_VBD.mean(1, keepdim=True)) / (z_VBD.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    pairs = list(itertools.combinations(z_VBD, 2))
    total = z_VBD.new_zeros(())
    for a_BD, b_BD in pairs:
        c_DD = a_BD.T @ b_BD / len(a_BD)
        on_D = c_DD.diagonal()
        total = total + (on_D - 1).square().sum() + LAMBDA * (c_DD.square().sum() - on_D.square().sum())
    return total / len(pairs)


def lightlys() -> dict[str, Loss]:
    """lightly's losses, or nothing when it is not installed."""
    try:
        from lightly.loss import BarlowTwinsLoss, VICRegLoss
    except ImportError:
        return {}
    theirs, their_vicreg = BarlowTwinsLoss(lambda_param=LAMBDA), VICRegLoss()
    return {
        "lightly barlow_twins": lambda z_VBD: theirs(z_VBD[0], z_VBD[1]),
        "lightly vicreg": lambda z_VBD: their_vicreg(z_VBD[0], z_VBD[1]),
    }


def cases(dims: list[int], views: list[int]) -> list[tuple[str, Loss, int, int]]:
    """(name, loss, V, D); the quadratic and D x D forms stop where one call would take minutes."""
    found: list[tuple[str, Loss, int, int]] = []
    for D, V in itertools.product(dims, views):
        found += [("fastssl barlow_twins", ours, V, D), ("fastssl vicreg", ours_vicreg, V, D)]
        found.append(("fastssl sigreg", ours_sigreg, V, D))
        if D <= 1024 or V <= 2:
            found.append(("barlow_twins as over ranks", ours_over_ranks, V, D))
            found.append(("all pairs", all_pairs, V, D))
        if V == 2:
            found += [(name, loss, V, D) for name, loss in lightlys().items()]
    return found


def embeddings(V: int, B: int, D: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(V, B, D, generator=generator).to(device).requires_grad_()


def once_ms(loss: Loss, z_VBD: Tensor) -> tuple[float, float]:
    """Wall time and processor time of all threads; the second is fair on a machine that others use too."""
    wait = torch.cuda.synchronize if z_VBD.is_cuda else (lambda: None)
    z_VBD.grad = None
    wait()
    start, busy = time.perf_counter(), time.process_time()
    loss(z_VBD).backward()
    wait()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - busy)


def peak_mb(loss: Loss, z_VBD: Tensor) -> float:
    """Largest total of bytes allocated and not yet freed during one call, gradient included."""
    z_VBD.grad = None
    if z_VBD.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(z_VBD).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss(z_VBD).backward()
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 8192])
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--only", default="", help="measure the implementations whose name has this in it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/losses.json")
    args = parser.parse_args()
    guards.keep_freed_memory()  # as training does; else page faults, not the loss, are what is timed
    todo = [case for case in cases(args.dims, args.views) if args.only in case[0]]
    times: list[list[tuple[float, float]]] = [[] for _ in todo]
    for turn in range(args.rounds + 1):
        for (_, loss, V, D), kept in zip(todo, times, strict=True):
            spent = once_ms(loss, embeddings(V, args.batch, D, args.device))
            if turn:  # the first round warms up
                kept.append(spent)
        print(f"round {turn} of {args.rounds}", file=sys.stderr)
    rows = []
    for (name, loss, V, D), kept in zip(todo, times, strict=True):
        work = {"views": V, "dim": D, "batch": args.batch, "device": args.device}
        peak = peak_mb(loss, embeddings(V, args.batch, D, args.device))
        wall, busy = zip(*kept, strict=True)
        note = {"note": BOTH_ORDERS} if (name, V) == ("fastssl barlow_twins", 2) else {}
        for metric, values in zip(METRICS, (wall, busy, [peak]), strict=True):
            rows.append(row(name, work, metric, values, **note))
        print(f"{name:34} V={V:<3} D={D:<5} {rows[-3]['median']:9.2f} ms {peak:9.1f} MB", flush=True)
    for name, D, metric in itertools.product([f"fastssl {name}" for name in losses.__all__], args.dims, METRICS):
        cost = {
            r["work"]["views"]: r["median"]
            for r in rows
            if (r["impl"], r["work"]["dim"], r["metric"]) == (name, D, metric)
        }
        if 2 in cost and 16 in cost:
            print(f"{name} D={D}: V=16 costs {cost[16] / (8 * cost[2]):.2f} times eight V=2 in {metric}")
    write(args.json, "losses", rows)


if __name__ == "__main__":
    main()
