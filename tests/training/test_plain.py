"""What the caller has set in torch changes neither a run nor what it leaves."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastssl
from fastssl.pretrained.evaluation.evaluate import evaluate


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),  # nothing can be read of it: whatever lands there is an error
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[Any]:
    context: contextlib.AbstractContextManager[Any] = request.param()
    return context


def test_a_run_is_the_same(
    setting: contextlib.AbstractContextManager[Any], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}}
    tiny["evaluate"] = {"linear_epochs": 2}
    plain = fastssl.train(tiny, run_dir=tmp_path / "plain")
    images = np.arange(4 * 16 * 16 * 3, dtype=np.uint8).reshape(4, 16, 16, 3)
    expected = fastssl.load(tmp_path / "plain", device="cpu").embed(images)
    with setting:
        other = fastssl.train(tiny, run_dir=tmp_path / "other")
        loaded = fastssl.load(tmp_path / "other", device="cpu")
        features = loaded.embed(images)
        record = evaluate(tmp_path / "other", probes=["linear"], linear_epochs=1, device="cpu")
    assert other["validation"]["loss"] == plain["validation"]["loss"]
    np.testing.assert_array_equal(features, expected)
    assert record["rows"]
    loss = nn.Linear(loaded.features_dim, 2)(loaded.backbone(torch.ones(2, 3, 16, 16))).sum()
    loss.backward()  # weights loaded under inference_mode could not be trained
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in loaded.backbone.parameters())


def state() -> tuple[Any, ...]:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return *modes, torch.get_default_dtype(), torch.get_default_device()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_views_are_the_same(
    setting: contextlib.AbstractContextManager[Any], tiny_data: tuple[Path, Path], backend: Any
) -> None:
    def epoch() -> list[torch.Tensor]:
        return [views for views, _, _ in fastssl.views(tiny_data[0], batch_size=64, device="cpu", backend=backend)]

    plain = epoch()
    with setting:
        before = state()
        other = epoch()
        assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
