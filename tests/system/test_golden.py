"""Losses of fixed recipes and seeds, recorded once: no change of structure may move a single bit of them."""

import json
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from llvmlite import binding
from tiny import one_torch_thread, tiny

from fastssl.training.loop import train

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("losses.json").read_text(encoding="utf-8"))
CASES: dict[str, dict[str, Any]] = {
    "barlow_twins": {"loss": {"name": "barlow_twins"}},
    "barlow_twins authors": {
        "loss": {
            "name": "barlow_twins",
            "form": "authors",
            "standardize": "joint",
            "l2_normalize": True,
            "redundancy_weight": 0.02,
        },
        "augment": {"views": 4},
    },
    "vicreg": {"loss": {"name": "vicreg"}, "augment": {"views": 3}, "optim": {"name": "lars", "lr": 0.1}},
    "sigreg": {"loss": {"name": "sigreg"}, "augment": {"views": 3}},
    "barlow_twins bf16 accumulated": {
        "train": {"precision": "bf16"},
        "optim": {"accumulate_steps": 2, "name": "sgd"},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_recorded_ones(name: str, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    with one_torch_thread():
        train(tiny((tiny_data[0], None), **CASES[name]), run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    recorded = [float.fromhex(value) for value in GOLDEN["losses"][name]]
    here = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": binding.get_host_cpu_name(),
        "numba": numba.__version__,
    }
    if here == {key: GOLDEN[key] for key in here}:
        assert losses == recorded
    else:  # another processor or torch adds in another order, and training amplifies that from step to step
        assert losses[0] == pytest.approx(recorded[0], rel=1e-2 if "bf16" in name else 1e-4)
        assert len(losses) == len(recorded)
