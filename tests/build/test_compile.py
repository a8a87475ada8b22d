"""Every network that a process compiles is compiled, the twelfth like the first; nothing runs eagerly in silence."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fastssl import build
from fastssl.recipe.load import load


def test_a_dozen_networks_of_one_process_are_all_compiled(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    recipe = load(tiny_recipe, ["train.compile=true", "train.channels_last=false"])
    networks = [build.model.network(recipe, in_channels=3, device=torch.device("cpu")) for _ in range(12)]
    for network in networks:
        before = len(calls)
        build.model.compiled(recipe, network)((torch.rand(2, 4, 3, 16, 16),))
        assert len(calls) == before + 1
