"""What ranks add to a network and a loss: no break in the compiler's graph, and few round trips."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastssl.build import ranks
from fastssl.losses.barlow_twins import barlow_twins
from fastssl.losses.vicreg import vicreg
from fastssl.models.backbones import backbone
from fastssl.training.distributed import data_parallel, synchronize_batch_norm, without_sync


@pytest.fixture
def _two_ranks() -> Iterator[None]:
    """A group whose other rank is not there: sums come back as they went."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_two_ranks")
def test_synchronized_batch_norm_stays_in_one_graph() -> None:
    network = synchronize_batch_norm(
        backbone("resnet_tiny", stem="patch2", width=0.25), torch.device("cpu"), compiled=True
    )
    assert not [m for m in network.modules() if type(m) in (nn.BatchNorm2d, nn.SyncBatchNorm)]
    found = torch._dynamo.explain(network)(torch.randn(4, 3, 16, 16))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.usefixtures("_two_ranks")
@pytest.mark.parametrize("form", ["leave_one_out", "authors", "vicreg"])
def test_a_loss_over_ranks_takes_three_round_trips(form: str) -> None:
    trips: list[int] = []

    def counted(x: Tensor) -> Tensor:
        trips.append(x.numel())
        return ranks.all_sum(x)

    loss = vicreg if form == "vicreg" else partial(barlow_twins, form=form)  # type: ignore[arg-type]
    loss(torch.randn(4, 8, 16), all_sum=counted)
    assert len(trips) == 3


@pytest.mark.usefixtures("_two_ranks")
def test_a_part_of_an_accumulated_step_is_not_synchronized_when_compiled() -> None:
    """The gradients' averaging lies around the network and inside the compiler, and is found there."""
    parallel = data_parallel(nn.Linear(2, 2), torch.device("cpu"))
    compiled = torch.compile(parallel, backend="eager")
    with without_sync(compiled):
        assert not parallel.require_backward_grad_sync
    assert parallel.require_backward_grad_sync
