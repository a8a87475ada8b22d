"""A step on the CPU next to other work: whole views forwarded and differentiated by one worker thread per core.

With intra-op threads every operator ends in a barrier, and a thread that lost its core to another program is waited
for there, hundreds of times per step. Here workers of one intra-op thread each meet twice per step, at the embeddings
and at the gradients, which are added in the order of the views: the bits do not depend on the number of workers.

V views, B images, F features, D embedding dimensions.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models.pretrainer import Pretrainer
from fastssl.models.workers import pool

Embedded = tuple[Tensor, Tensor]


class ViewParallel(nn.Module):
    """A Pretrainer called like itself, whose views are forwarded and differentiated side by side.

    Each view, or group of its images, has its own batch statistics, and running averages follow one after another.
    `loss.backward()` adds to the parameters' gradients as ever.
    """

    def __init__(self, network: Pretrainer, *, workers: int) -> None:
        super().__init__()
        self.network, self.workers = network, workers
        self.replicas: list[Pretrainer] = []  # one per unit of statistics, around the same parameters
        self.token = torch.zeros((), requires_grad=True)  # so that autograd asks for the gradients
        self.pool = pool(workers, "fastssl-view")

    def forward(self, groups: Sequence[Tensor]) -> Embedded:
        """Features (N, F), detached, and embeddings (V, B, D)."""
        units = self.network.units(groups)
        while len(self.replicas) < len(units):
            self.replicas.append(replica_of(self.network))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        outputs = list(self.pool.map(partial(embed_unit, dtype=dtype), self.replicas, units))
        follow_statistics(self.network, self.replicas[: len(units)])
        z_1ND = _Join.apply(self.token, self, [z_1BD for _, z_1BD in outputs])  # type: ignore[no-untyped-call]
        views = sum(len(views_VBCHW) for views_VBCHW in groups)
        return torch.cat([h_BF.detach() for h_BF, _ in outputs]), z_1ND.view(views, -1, z_1ND.shape[-1])

    def differentiate(self, embeddings: Sequence[Tensor], dz_1ND: Tensor) -> None:
        """Adds every unit's gradient, in the order of the views."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        call = partial(gradients, parameters=parameters)
        sizes = [z_1BD.shape[1] for z_1BD in embeddings]
        by_unit = list(self.pool.map(call, embeddings, dz_1ND.split(sizes, dim=1)))  # type: ignore[no-untyped-call]
        for p, *of_units in zip(parameters, *by_unit, strict=True):
            present = [g for g in of_units if g is not None]
            if present:
                total = torch.zeros_like(p) if p.grad is None else p.grad  # lies in memory as the parameter does
                for g in present:
                    total += g
                p.grad = total

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown()


class _Join(torch.autograd.Function):
    """Embeddings of all units, cut off from the units' graphs; its backward has the workers go through those."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, owner: ViewParallel, embeddings: list[Tensor]) -> Tensor:
        ctx.owner, ctx.embeddings = owner, embeddings
        return torch.cat([z_1BD.detach() for z_1BD in embeddings], dim=1)

    @staticmethod
    def backward(ctx: Any, dz_1ND: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.owner.differentiate(ctx.embeddings, dz_1ND)
        return None, None, None


def replica_of(network: Pretrainer) -> Pretrainer:
    """The network with buffers of its own around the same parameters.

    Its running averages forget at once, so that they hold the batch statistics of the last call.
    """
    shared = {id(p): p for p in network.parameters()}
    replica = copy.deepcopy(network, dict(shared))
    for module in replica.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    return replica


def embed_unit(replica: Pretrainer, images_1BCHW: Tensor, *, dtype: torch.dtype | None) -> Embedded:
    # no cache of casts: it is one for all threads, and the first to leave would empty it
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        return replica.embed_together([images_1BCHW])


def gradients(z_1BD: Tensor, dz_1BD: Tensor, *, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(z_1BD, parameters, dz_1BD, allow_unused=True)


@torch.no_grad()
def follow_statistics(network: Pretrainer, replicas: Sequence[Pretrainer]) -> None:
    """Moves the network's running averages by the units' batch statistics, one after another."""
    for own, *others in zip(network.modules(), *(replica.modules() for replica in replicas), strict=True):
        if not isinstance(own, _BatchNorm) or not own.training or own.running_mean is None:
            continue
        assert own.running_var is not None
        assert own.num_batches_tracked is not None
        for other in others:
            own.num_batches_tracked += 1
            weight = own.momentum if own.momentum is not None else 1 / float(own.num_batches_tracked)
            own.running_mean.lerp_(other.running_mean, weight)
            own.running_var.lerp_(other.running_var, weight)


@contextlib.contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """So many threads per operator that this thread runs, for a while."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
