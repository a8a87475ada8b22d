"""What ranks add to a network and a loss: no break in the compiler's graph, and few round trips."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastssl import build
from fastssl.build import ranks
from fastssl.errors import UserError
from fastssl.losses import barlow_twins, sigreg, vicreg
from fastssl.losses.loss import Terms
from fastssl.models.backbones import backbone
from fastssl.recipe.load import load
from fastssl.training.distributed import data_parallel, synchronize_batch_norm, without_sync
from fastssl.training.step import step_of


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
def test_synchronized_batch_norm_keeps_timms_activations() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network, images = timm.create_model("mobilenetv3_small_050", num_classes=0), torch.randn(4, 3, 32, 32)
    expected, keys = network(images).detach(), list(network.state_dict())
    for kind in ("cuda", "cpu"):
        synchronize_batch_norm(network, torch.device(kind))
        assert not [m for m in network.modules() if type(m).__name__ == "BatchNormAct2d"]
        assert list(network.state_dict()) == keys
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.usefixtures("_two_ranks")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_batch_norm_with_a_forward_of_its_own_is_refused(kind: str) -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4)))
    with pytest.raises(UserError, match=r"^0\.1 is a Scaled, a batch normalization with a forward of its own"):
        synchronize_batch_norm(network, torch.device(kind))


@pytest.mark.usefixtures("_two_ranks")
@pytest.mark.parametrize(
    ("loss", "trips_of_a_step"),
    [
        (partial(barlow_twins, form="leave_one_out"), 3),
        (partial(barlow_twins, form="authors"), 3),
        (vicreg, 3),
        (partial(sigreg, seed=0), 1),
    ],
    ids=["leave_one_out", "authors", "vicreg", "sigreg"],
)
def test_a_loss_over_ranks_takes_few_round_trips(loss: Callable[..., Terms], trips_of_a_step: int) -> None:
    trips: list[int] = []

    def counted(x: Tensor) -> Tensor:
        trips.append(x.numel())
        return ranks.all_sum(x)

    loss(torch.randn(4, 8, 16), all_sum=counted)
    assert len(trips) == trips_of_a_step


@pytest.mark.usefixtures("_two_ranks")
def test_network_and_loss_over_ranks_are_one_graph_inside_data_parallelism(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # here: it takes long to import

    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    device, recipe = torch.device("cpu"), load(tiny_recipe, ["train.compile=true"])
    network = build.model.network(recipe, in_channels=3, device=device)
    synchronize_batch_norm(network, device, compiled=True)
    parallel = partial(data_parallel, device=device)
    step = step_of(recipe, network, device=device, parallel=parallel, may_compile=True)
    step.forward((torch.rand(2, 8, 3, 16, 16),))
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("_two_ranks")
def test_a_part_of_an_accumulated_step_is_not_synchronized_when_compiled() -> None:
    """The gradients' averaging lies around the network and inside the compiler, and is found there."""
    parallel = data_parallel(nn.Linear(2, 2), torch.device("cpu"))
    compiled = torch.compile(parallel, backend="eager")
    with without_sync(compiled):
        assert not parallel.require_backward_grad_sync
    assert parallel.require_backward_grad_sync


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("eager", ["loss.name=barlow_twins", "train.precision=bf16"]),
        ("eager", ["loss.name=vicreg", "model.batch_norm=per_view"]),
        ("eager", ["loss={name: sigreg}"]),
        ("aot_eager", ["loss.name=vicreg", "train.gradient_checkpointing=true"]),  # which plans what is computed again
    ],
    ids=["barlow_twins", "vicreg", "sigreg", "checkpointed"],
)
def test_network_and_loss_are_one_graph_and_give_the_bits_of_eager(
    backend: str, changes: list[str], tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # here: it takes long to import

    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    recipe = load(tiny_recipe, ["train.compile=true", *changes])
    network = build.model.network(recipe, in_channels=3, device=torch.device("cpu"))
    compiled = step_of(recipe, network, device=torch.device("cpu"), may_compile=True)
    before, results = compiled.statistics(), []
    for step in (compiled, replace(compiled, compiled=None)):
        for buffer, value in before:
            buffer.copy_(value)
        terms = step.forward((torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)),))
        step.backward(terms)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        results.append([*terms.values(), *gradients, *(value for _, value in step.statistics())])
        step.optimizer.zero_grad(set_to_none=True)
    assert graphs.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
