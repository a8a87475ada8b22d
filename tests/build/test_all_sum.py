"""Real gloo processes: the losses of 2 and 4 ranks are one process's, in value, gradient and size."""

import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastssl.build import ranks
from fastssl.losses import barlow_twins, sigreg, vicreg
from fastssl.losses.statistics import identity

V, B, F, D = 3, 11, 6, 5  # 11 images do not divide over 2 or 4 ranks
LOSSES = {
    f"{form}-{standardize}": partial(
        barlow_twins,
        redundancy_weight=0.2,
        form=form,
        standardize=standardize,
        l2_normalize=standardize == "joint",
    )
    for form in ("leave_one_out", "authors")
    for standardize in ("per_view", "joint")
} | {
    "vicreg": partial(vicreg, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0),
    "vicreg-authors": partial(vicreg, invariance_weight=25.0, form="authors"),
    "sigreg": partial(sigreg, seed=5, sigreg_weight=0.5, slices=16),
}


def images() -> Tensor:
    return torch.randn(V, B, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(F, D, dtype=torch.float64)


def step(net: torch.nn.Module, x_VBF: Tensor, loss) -> tuple[Tensor, list[Tensor]]:
    net.zero_grad()
    value = loss(net(x_VBF.flatten(0, 1)).view(V, -1, D))["loss"]
    value.backward()
    return value.detach(), [p.grad.clone() for p in net.parameters()]


def raw_all_reduce(x: Tensor) -> Tensor:
    """The mistake: the sum is made on a value autograd does not follow across ranks."""
    total = x.clone()
    dist.all_reduce(total.detach())
    return total


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks.start("cpu", timeout_s=60)
    ranks.start("cpu")  # a second call changes nothing
    mine = ranks.shard(B)
    x = images()[:, mine.start : mine.stop]
    net = DistributedDataParallel(network())
    found = {name: step(net, x, partial(loss, all_sum=ranks.all_sum)) for name, loss in LOSSES.items()}
    found["raw"] = step(net, x, partial(LOSSES["leave_one_out-per_view"], all_sum=raw_all_reduce))
    found["rows"] = ranks.gather_rows(x[0])
    found["labels"] = ranks.gather_rows(torch.arange(mine.start, mine.stop))
    found["no_rows"] = ranks.gather_rows(x[0][: 0 if rank else 2])
    found["who"] = (ranks.rank(), ranks.world(), ranks.is_main(), ranks.local_rank())
    found["count"] = ranks.all_sum(torch.tensor(float(len(mine))))
    ranks.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    ranks.stop()


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp(f"ranks{request.param}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "fastssl.losses"])  # importing torch once, not six times
    mp.start_processes(worker, args=(world, port, str(folder)), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{r}.pt") for r in range(world)]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_one_processs(outcomes, name):
    value, gradients = step(network(), images(), LOSSES[name])
    assert gradients[0].abs().sum() > 0.1
    for found in outcomes:
        torch.testing.assert_close(found[name][0], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[name][1], gradients, rtol=1e-10, atol=1e-10)


def test_a_raw_all_reduce_loses_gradient(outcomes):
    value, gradients = step(network(), images(), LOSSES["leave_one_out-per_view"])
    torch.testing.assert_close(outcomes[0]["raw"][0], value, rtol=1e-10, atol=1e-10)
    # The correlation's own path is short by 1 / W, and the statistics' paths with it.
    ratio = outcomes[0]["raw"][1][0].norm() / gradients[0].norm()
    assert ratio < 1.1 / len(outcomes) + 0.2
    assert ratio < 0.8


def test_rows_come_back_whole_and_in_order(outcomes):
    for found in outcomes:
        assert torch.equal(found["rows"], images()[0])
        assert torch.equal(found["labels"], torch.arange(B))
        assert torch.equal(found["no_rows"], images()[0][:2])
        assert found["count"] == B


def test_ranks_know_themselves(outcomes):
    assert [found["who"] for found in outcomes] == [(r, len(outcomes), r == 0, r) for r in range(len(outcomes))]


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks.start("cpu")
    assert not dist.is_initialized()
    x = torch.ones(3, requires_grad=True)
    assert ranks.all_sum(x) is x
    assert ranks.gather_rows(x) is x
    assert identity(x) is x
    assert (ranks.rank(), ranks.world(), ranks.local_rank()) == (0, 1, 0)
    assert ranks.shard(7) == range(7)
    ranks.barrier()
    ranks.stop()
