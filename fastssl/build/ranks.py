"""Ranks under torchrun: start, who am I, and a sum over ranks that autograd sees.

A raw `dist.all_reduce` is invisible to autograd: under DistributedDataParallel a loss built on it has a
gradient of exactly 1 / W of the true one. Every function here is the obvious no-op in a single process.

W ranks, N rows on this rank.
"""

import contextlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce, wait_tensor

MEET_S, POLL_S = 600.0, 0.05


class _Meeting:
    """Where ranks wait for each other, and how often they have."""

    store: dist.Store | None = None
    count = 0


_meeting = _Meeting()


def start(device_type: str, *, timeout_s: float = 1800.0) -> None:
    """Join the group torchrun describes in the environment; nothing to do without one or when joined.

    Args:
        device_type: "cuda" uses NCCL, anything else gloo.
        timeout_s: after which a collective that never completes is an error.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if device_type == "cuda":
        torch.cuda.set_device(local_rank())
    backend = "nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world = agent_store(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    _meeting.store, _meeting.count = dist.PrefixStore("fastssl", store), 0


def agent_store() -> dist.Store:
    """The store of torchrun's agent, with keys of this restart alone.

    The store outlives the processes: without a prefix, ranks that were started again wait for ever at the addresses
    of the dead ones (seen with torch 2.14).
    """
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent)


def meet(limit_s: float = MEET_S) -> None:
    """Wait until every rank is here, by the store alone: a collective ends at different times on different ranks.

    A rank that closes its connections at once can cut off the last bytes of a slower one, which then aborts. Ranks
    that never come, or a store that is gone with its process, end the wait.
    """
    if world() == 1 or _meeting.store is None:
        return
    _meeting.count += 1
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(RuntimeError):
        here = _meeting.store.add("here", 1)
        while here < _meeting.count * world() and time.monotonic() < deadline:
            time.sleep(POLL_S)
            here = _meeting.store.add("here", 0)


def stop() -> None:
    """Leave the group, if joined, once every rank is about to."""
    if dist.is_initialized():
        meet()
        _meeting.store = None
        dist.destroy_process_group()


def rank() -> int:
    """This process among all, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process among those of its machine, 0 alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Number of processes on this machine, 1 alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def world() -> int:
    """Number of processes, 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()


class _AllSum(torch.autograd.Function):
    """y = sum_r x_r on every rank; with a loss on every rank, dx_r = sum_r dy_r."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the form that torch.compile takes into its graph
            group = dist.group.WORLD
            assert group is not None
            summed: Tensor = wait_tensor(all_reduce(x.detach().contiguous(), "sum", group))  # type: ignore[no-untyped-call]
            return summed
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:  # type: ignore[override]
        return all_sum(dy)


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over ranks, the same on each; every rank must call it, in the same order.

    The backward sums too, so a loss computed alike on all W ranks gives W times its share of the gradient
    on each, and DistributedDataParallel's mean over ranks is the gradient of the whole batch.
    """
    return x if world() == 1 else _AllSum.apply(x)  # type: ignore[no-untyped-call,no-any-return]


def shard(count: int) -> range:
    """This rank's contiguous part of range(count); parts differ by one at most and none is padded."""
    start_at, end_at = (count * (rank() + i) // world() for i in (0, 1))
    return range(start_at, end_at)


def gather_rows(x: Tensor) -> Tensor:
    """Rows (N, ...) of all ranks in rank order, on every rank, without gradient; N may differ."""
    if world() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = max(int(c) for c in counts)
    padded = torch.cat([x.detach(), x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])
