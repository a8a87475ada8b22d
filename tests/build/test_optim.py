"""Schedules against literal tables, weight decay by rank, LARS against its paper's formula."""

import math

import pytest
import torch
from torch import nn

from fastssl.build.optim import learning_rate_at, make_optimizer, parameter_groups
from fastssl.models.backbones import backbone


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


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = parameter_groups([layer], weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_every_optimizer_descends_a_quadratic(name: str) -> None:
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


def test_lars_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    lr, momentum, trust, decay = 0.3, 0.9, 0.02, 0.1
    groups = [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}]
    lars = make_optimizer(
        "lars", groups, lr=lr, momentum=momentum, betas=(0.9, 0.999), trust=trust, device=torch.device("cpu")
    )
    want_w, want_b, velocity_w, velocity_b = w.detach().clone(), b.detach().clone(), 0.0, 0.0
    for step in range(3):
        gradient_w, gradient_b = torch.full((4, 3), 0.5 + step), torch.full((4,), 1.0 - step)
        w.grad, b.grad = gradient_w.clone(), gradient_b.clone()
        lars.step()
        direction = gradient_w + decay * want_w
        velocity_w = momentum * velocity_w + lr * trust * want_w.norm() / direction.norm() * direction
        velocity_b = momentum * velocity_b + lr * gradient_b
        want_w, want_b = want_w - velocity_w, want_b - velocity_b
    torch.testing.assert_close(w.detach(), want_w)
    torch.testing.assert_close(b.detach(), want_b)


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
