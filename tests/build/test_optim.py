"""Schedules against literal tables, weight decay by rank, LARS against its paper's formula."""

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.build.muon import Muon, orthogonal
from fastssl.build.optim import learning_rate_at, make_optimizer, optimizer, parameter_groups, set_learning_rate
from fastssl.models.backbones import backbone
from fastssl.models.pretrainer import Pretrainer
from fastssl.recipe.load import load
from fastssl.recipe.schema import Optimizer, Schedule
from fastssl.runs import checkpoint
from fastssl.training.step import Step


class Operators(TorchDispatchMode):
    """Counts what is dispatched; an operator over a list of tensors is one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def rates(**changes: object) -> list[float]:
    settings = {"base": 1.0, "warmup_steps": 2, "total_steps": 6, "schedule": "cosine", "final_fraction": 0.0} | changes
    return [learning_rate_at(step, **settings) for step in range(6)]  # type: ignore[arg-type]


def test_warm_up_then_half_a_cosine() -> None:
    half = math.sqrt(0.5)
    assert rates() == pytest.approx([0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_constant_and_final_fraction() -> None:
    assert rates(schedule="constant", warmup_steps=0) == [1.0] * 6
    assert learning_rate_at(
        6, base=2.0, warmup_steps=0, total_steps=6, schedule="cosine", final_fraction=0.1
    ) == pytest.approx(0.2)


def test_norms_and_biases_are_not_decayed_even_in_downsample() -> None:
    network = backbone("resnet18", stem="cifar")
    decayed, free = parameter_groups([network], weight_decay=0.1)
    assert {p.ndim for p in decayed["params"]} == {4}
    names = {id(p): n for n, p in network.named_parameters()}
    assert any("downsample.1" in names[id(p)] for p in free["params"])
    assert not any("downsample.1" in names[id(p)] for p in decayed["params"])
    assert free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_norms_and_biases_are_decayed_where_the_recipe_says_so() -> None:
    recipe = load({"data": {"path": "x"}, "train": {"epochs": 1}, "optim": {"weight_decay": 0.1}})
    layer, device = nn.Linear(2, 2), torch.device("cpu")
    for changes, expected in (((), [0.1, 0.0]), (("optim.decay_vectors=true",), [0.1, 0.1])):
        groups = optimizer(load(recipe, changes), layer, device=device).param_groups
        assert [(g["params"][0].ndim, g["weight_decay"]) for g in groups] == list(zip([2, 1], expected, strict=True))


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = parameter_groups([layer], weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_warms_up_to_the_base_and_never_rises_again(schedule: Schedule) -> None:
    values = rates(schedule=schedule, final_fraction=0.1)
    assert values[:2] == pytest.approx([0.5, 1.0])
    assert all(earlier >= later >= 0.1 for earlier, later in itertools.pairwise(values[1:]))


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_descends_a_quadratic(name: Optimizer) -> None:
    w = nn.Parameter(torch.tensor([[3.0, -2.0]]))
    groups = [{"params": [w], "weight_decay": 0.0}]
    chosen = make_optimizer(
        name, groups, lr=0.1, momentum=0.5, betas=(0.9, 0.99), trust=0.1, device=torch.device("cpu")
    )
    for _ in range(200):
        w.square().sum().backward()
        chosen.step()
        chosen.zero_grad(set_to_none=True)
    assert float(w.detach().norm()) < 1.0


@pytest.mark.parametrize("inside", [True, False], ids=["You et al.", "Barlow Twins' code"])
def test_lars_is_the_published_formula(inside: bool) -> None:
    """With the rate inside the momentum, as in You et al., or outside, as in Barlow Twins' code."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    u = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    momentum, trust, decay = 0.9, 0.02, 0.1
    groups = [{"params": [w, u], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}]
    lars = make_optimizer(
        "lars",
        groups,
        lr=1.0,
        momentum=momentum,
        betas=(0.9, 0.999),
        trust=trust,
        rate_in_momentum=inside,
        device=torch.device("cpu"),
    )
    want = {p: p.detach().clone() for p in (w, u, b)}
    velocity = {p: torch.zeros_like(p) for p in want}
    for step in range(4):
        lr = 0.3 / (1 + step)
        for p, value in want.items():
            p.grad = torch.randn(p.shape)
            direction = p.grad + decay * value if p is not b else p.grad
            local = trust * value.norm() / direction.norm() if p is not b else 1.0
            velocity[p] = momentum * velocity[p] + (lr if inside else 1.0) * local * direction
            want[p] = value - (1.0 if inside else lr) * velocity[p]
        set_learning_rate(lars, lr)
        lars.step()
    for p, value in want.items():
        torch.testing.assert_close(p.detach(), value)


def test_lars_takes_hardly_more_operators_than_fused_sgd() -> None:
    """Over a whole step of ResNet-50, at most 10 % more; a rate per layer used to cost 565 operators."""
    network = Pretrainer(backbone("resnet50", stem="cifar", width=0.125), nn.Identity())
    counts = {}
    for name in ("sgd", "lars"):
        groups = parameter_groups([network], weight_decay=1e-4)
        chosen = make_optimizer(
            name, groups, lr=0.1, momentum=0.9, betas=(0.9, 0.999), trust=0.001, device=torch.device("cpu")
        )
        step = Step(network, lambda z_VBD: {"loss": z_VBD.square().mean()}, chosen)
        step((torch.randn(2, 2, 3, 8, 8),), 0.1)
        with Operators() as seen:
            step((torch.randn(2, 2, 3, 8, 8),), 0.1)
        counts[name] = seen.count
    assert counts["lars"] <= 1.1 * counts["sgd"]


def test_lars_at_zero_weight_takes_a_plain_step() -> None:
    w = nn.Parameter(torch.zeros(2, 2))
    lars = make_optimizer(
        "lars",
        [{"params": [w], "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.0,
        betas=(0.9, 0.999),
        trust=0.001,
        device=torch.device("cpu"),
    )
    w.grad = torch.ones(2, 2)
    lars.step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1))


def muon_of(parameters: list[nn.Parameter], *, lr: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return make_optimizer(
        "muon", groups, lr=lr, momentum=momentum, betas=(0.9, 0.99), trust=0.001, device=torch.device("cpu")
    )


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (16, 16), (1, 12), (5, 1)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    made = torch.linalg.svdvals(orthogonal(x))
    assert 0.65 < float(made.min()) <= float(made.max()) < 1.25
    diagonal = left.mT @ orthogonal(x) @ right.mT
    torch.testing.assert_close(diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), atol=2e-3, rtol=0)
    torch.testing.assert_close(orthogonal(1e-3 * x), orthogonal(x), atol=1e-3, rtol=0)  # whatever the length


def test_muon_is_torchs_for_matrices_and_adamw_for_vectors() -> None:
    """torch's iterates in bfloat16 and takes no kernels: a kernel here is the matrix of its filters there."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(12, 30)), nn.Parameter(torch.randn(12))
    wide = nn.Parameter(torch.randn(12, 30))  # of one shape with w: both are one product
    kernel = nn.Parameter(torch.randn(16, 4, 3, 3).to(memory_format=torch.channels_last))
    ours = muon_of([w, b, wide, kernel], lr=0.0, momentum=0.9, decay=0.1)
    their = [nn.Parameter(p.detach().clone().flatten(1)) for p in (w, wide, kernel)]
    muon = torch.optim.Muon(their, lr=1.0, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    vector = nn.Parameter(b.detach().clone())
    adamw = torch.optim.AdamW([vector], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    moved = 0.0
    for step in range(5):
        before = w.detach().clone()
        for p in (w, b, wide, kernel):
            p.grad = torch.randn(p.shape)
        for p, theirs in zip((w, wide, kernel), their, strict=True):
            assert p.grad is not None
            theirs.grad = p.grad.flatten(1)
        assert b.grad is not None
        vector.grad = b.grad.clone()
        for optimizer_ in (ours, muon, adamw):
            set_learning_rate(optimizer_, 0.01 / (1 + step))
            optimizer_.step()
        moved += float((w.detach() - before).norm())
    torch.testing.assert_close(b.detach(), vector.detach())
    for p, theirs in zip((w, wide, kernel), their, strict=True):
        assert float((p.detach().flatten(1) - theirs.detach()).norm()) < 0.02 * moved


def test_muon_goes_on_from_a_checkpoint_where_its_parameters_are() -> None:
    """torch moves the number of the step with the moments; a fused kernel takes it from no other device."""
    torch.manual_seed(0)
    layer, again = nn.Linear(3, 4), nn.Linear(3, 4)
    first, second = (muon_of(list(x.parameters()), lr=0.1, momentum=0.9, decay=0.1) for x in (layer, again))
    gradients = [[torch.randn(p.shape) for p in layer.parameters()] for _ in range(4)]

    def step(chosen: torch.optim.Optimizer, number: int) -> None:
        parameters = [p for group in chosen.param_groups for p in group["params"]]
        for p, gradient in zip(parameters, gradients[number], strict=True):
            p.grad = gradient.clone()
        chosen.step()

    for number in range(2):
        step(first, number)
    again.load_state_dict(layer.state_dict())
    kept = {key: value.clone() for key, value in checkpoint.optimizer_snapshot(first).items()}
    checkpoint.restore_optimizer(second, kept)
    for number in (2, 3):
        step(first, number)
        step(second, number)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    elsewhere = Muon(
        [{"params": list(nn.Linear(3, 4, device="meta").parameters())}],
        lr=0.1,
        momentum=0.9,
        betas=(0.9, 0.99),
        fused=True,
    )
    checkpoint.restore_optimizer(elsewhere, kept)
    assert {value.device.type for state in elsewhere.state.values() for value in state.values()} == {"meta"}


def test_the_singular_values_of_muons_steps_do_not_depend_on_the_gradients() -> None:
    """A gradient of one large and many small directions moves all of them alike."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(8, 20))
    optimizer_ = muon_of([w], lr=0.1, momentum=0.0, decay=0.0)
    u, _, vh = torch.linalg.svd(torch.randn(8, 20), full_matrices=False)
    w.grad = u @ torch.diag(torch.tensor([1.0] + [0.01] * 7)) @ vh
    optimizer_.step()
    moved = torch.linalg.svdvals(w.detach())
    assert float(moved.max() / moved.min()) < 2.0
    assert float(w.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2 * 20**0.5 / 20**0.5, rel=0.35)


def test_sgd_after_a_step_that_fp16s_scaler_left_out_is_sgd() -> None:
    p = nn.Parameter(torch.ones(1000))
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.999), "trust": 0.001}
    sgd = make_optimizer("sgd", [{"params": [p]}], device=torch.device("cpu"), **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for slope in (float("inf"), 2.0, 3.0):
        scaler.scale((p * slope).sum()).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
    torch.testing.assert_close(p.detach(), torch.full((1000,), 1 - 0.1 * 2 - 0.1 * (0.9 * 2 + 3)))
