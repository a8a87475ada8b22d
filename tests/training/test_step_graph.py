"""A step as one graph. Without CUDA a recording of the operators, with the memory they ran on, stands in for a graph:
like one it repeats what it has seen, numbers of Python included, and reads nothing but memory.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastssl
from fastssl import build
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.training import step_graph
from fastssl.training.step import Step, step_of
from fastssl.training.step_graph import WARM_UP_STEPS, StepGraphs

CPU = torch.device("cpu")


class Recording(TorchDispatchMode):
    """Operators in order, with their arguments and results; a number that the host reads is an error, as in CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            if x.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault((x.data_ptr(), x.shape, x.stride()), (x, x.clone()))
        result = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        self.made |= {x.untyped_storage().data_ptr() for x in results} - known
        self.tape.append((func, args, kwargs or {}, results))
        return result

    def undo(self) -> None:
        for x, value in self.before.values():
            x.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, results in self.tape:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for x, value in zip(results, again, strict=True):
                if x.data_ptr() != value.data_ptr():  # neither in place nor a view
                    x.copy_(value)


def recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    recording = Recording()
    with recording:
        values = run()
    with torch.no_grad():
        recording.undo()
    return torch.no_grad()(recording.replay), values


def steps(tiny_recipe: dict[str, Any], changes: list[str]) -> tuple[Step, Step]:
    """A recipe's step on operators, and as a graph, on networks of equal weights."""
    recipe = load(tiny_recipe, changes)
    networks = [build.model.network(recipe, in_channels=3, device=CPU) for _ in range(2)]
    plain, graphed = (step_of(recipe, network, device=CPU) for network in networks)
    return plain, replace(graphed, graphs=StepGraphs(recorded))


def views(step: int, *, side_px: int = 16, number: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (torch.rand(number, 8, side_px, side_px, 3, generator=generator).permute(0, 1, 4, 2, 3),)


def state(step: Step) -> list[Tensor]:
    assert isinstance(step.network, torch.nn.Module)
    moments = step.optimizer.state_dict()["state"]
    return [*step.network.state_dict().values(), *(x for x in tree_leaves(moments) if isinstance(x, Tensor))]


@pytest.mark.parametrize(
    "changes",
    [
        ["optim.name=adam"],
        ["optim.name=adamw", "optim.clip_norm=1.0", "optim.accumulate_steps=2"],
        ["optim.name=sgd"],
        ["optim.name=lars"],
        ["optim.name=lars", "optim.rate_in_momentum=false"],
        ["optim.name=muon"],
        ["loss={name: sigreg}"],
        ["loss.name=vicreg", "model.batch_norm=per_view", "train.precision=bf16"],
    ],
    ids=lambda changes: " ".join(changes),
)
def test_replayed_steps_are_those_of_the_operators(tiny_recipe: dict[str, Any], changes: list[str]) -> None:
    """With another rate, seed and views in each, bit for bit."""
    plain, graphed = steps(tiny_recipe, changes)
    for number in range(WARM_UP_STEPS + 4):
        lr = 2.0 ** -(5 + number)
        expected, found = (step(views(number), lr, number=number) for step in (plain, graphed))
        assert {name: float(term) for name, term in expected.items()} == {n: float(t) for n, t in found.items()}
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(graphed), strict=True))


def test_views_of_every_shape_have_their_graph(tiny_recipe: dict[str, Any]) -> None:
    plain, graphed = steps(tiny_recipe, [])
    for number in range(3 * WARM_UP_STEPS):
        for step in (plain, graphed):
            step(views(number, side_px=(16, 12)[number % 2]), 2.0**-6, number=number)
    assert graphed.graphs is not None
    assert len(graphed.graphs.by_shape) == 2
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(graphed), strict=True))


def test_terms_of_a_step_outlive_the_next(tiny_recipe: dict[str, Any]) -> None:
    _, graphed = steps(tiny_recipe, [])
    losses = [graphed(views(number), 2.0**-6, number=number)["loss"] for number in range(WARM_UP_STEPS + 3)]
    assert len({float(loss) for loss in losses}) == len(losses)


def test_what_one_graph_cannot_hold_is_refused_all_at_once(tiny_recipe: dict[str, Any]) -> None:
    changes = ["train.cuda_graph=true", "train.compile=reduce-overhead", "train.on_nonfinite=skip"]
    with pytest.raises(UserError) as refused:
        load(tiny_recipe, [*changes, "train.precision=fp16"])
    for field in ("train.compile reduce-overhead", "train.on_nonfinite skip", "train.precision fp16"):
        assert field in refused.value.what
    load(tiny_recipe, ["train.cuda_graph=true", "train.compile=true", "optim.accumulate_steps=2"])


def test_without_cuda_it_is_said_to_have_no_effect(tiny_recipe: dict[str, Any], tmp_path: Any) -> None:
    events: list[dict[str, Any]] = []
    recipe = load(tiny_recipe, ["train.cuda_graph=true", "train.epochs=1", "device=cpu"])
    fastssl.train(recipe, run_dir=tmp_path / "run", observe=events.append)
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert [message for message in said if "train.cuda_graph has no effect on cpu" in message]


@pytest.mark.parametrize(
    ("world", "precision", "said"),
    [(1, "bf16", ""), (2, "bf16", "with several ranks"), (1, "fp16", "in fp16, whose gradients the host looks at")],
)
def test_where_cuda_cannot_replay_operators_are_launched_and_it_is_said(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, world: int, precision: str, said: str
) -> None:
    recipe, device = load(tiny_recipe, ["train.cuda_graph=true"]), torch.device("cuda")
    monkeypatch.setattr(build.ranks, "world", lambda: world)
    monkeypatch.setattr(build.hardware, "precision", lambda recipe: precision)
    why = f"train.cuda_graph has no effect {said}: operators are launched one by one." if said else ""
    assert step_graph.not_used(recipe, device) == why
    assert step_graph.not_used(load(tiny_recipe), device) == ""


class Launches(TorchDispatchMode):
    """Counts what is dispatched, but for views of memory, which launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_replayed_step_launches_a_graph_and_few_copies(tiny_recipe: dict[str, Any]) -> None:
    """Views, rate and seed in, terms out; the operators themselves are the graph's."""
    _, graphed = steps(tiny_recipe, ["loss={name: sigreg}"])
    graphed = replace(graphed, graphs=StepGraphs(lambda run: (lambda: None, torch.zeros(4))))
    for number in range(WARM_UP_STEPS + 1):
        graphed(views(number), 2.0**-6, number=number)
    with Launches() as launches:
        graphed(views(9), 2.0**-6, number=9)
    assert launches.count <= 6
    with Launches() as eager:
        replace(graphed, graphs=None)(views(9), 2.0**-6, number=9)
    assert eager.count > 20 * launches.count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "lars", "muon", "sgd"])
def test_on_cuda_replayed_steps_are_those_of_the_operators(tiny_recipe: dict[str, Any], name: str) -> None:
    device = torch.device("cuda")
    recipe = load(tiny_recipe, ["device=cuda", "train.cuda_graph=true", "train.precision=fp32", f"optim.name={name}"])
    networks = [build.model.network(recipe, in_channels=3, device=device) for _ in range(2)]
    graphed, plain = (step_of(recipe, network, device=device) for network in networks)
    plain = replace(plain, graphs=None)
    for number in range(WARM_UP_STEPS + 5):
        on_device = tuple(group.to(device) for group in views(number))
        expected, found = (step(on_device, 2.0 ** -(8 + number), number=number) for step in (plain, graphed))
        for name, term in expected.items():
            torch.testing.assert_close(found[name], term.float(), rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_that_waits_is_refused(tiny_recipe: dict[str, Any]) -> None:
    device, recipe = torch.device("cuda"), load(tiny_recipe, ["device=cuda", "train.cuda_graph=true"])
    network = build.model.network(recipe, in_channels=3, device=device)

    def waiting(z_VBD: Tensor) -> dict[str, Tensor]:
        return {"loss": z_VBD.square().mean() * float(z_VBD.detach().amax())}

    step = step_of(recipe, network, device=device, loss=waiting)
    on_device = tuple(group.to(device) for group in views(0))
    for _ in range(WARM_UP_STEPS):
        step(on_device, 2.0**-6)
    with pytest.raises(UserError, match="cannot be captured"):
        step(on_device, 2.0**-6)
