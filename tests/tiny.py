"""The recipe that tests train in a second, and the one thread that equal bits need."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def tiny(files: tuple[Path, Path | None], /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Two views of 16 px shapes, two epochs of five steps in float32; sections change or add keys.

    Args:
        files: the training file of 200 images, and the test file or None.
    """
    train, test = files
    recipe: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "data": {"path": str(train), "val_count": 40, "batch_size": 32} | ({"test_path": str(test)} if test else {}),
        "augment": {"side_px": 16, "views": 2},
        "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [16, 16]},
        "optim": {"lr": 0.002},
        "train": {"epochs": 2, "precision": "fp32", "log_every_steps": 1},
        "evaluate": {"linear_epochs": 2, "knn_k": [5, 20]},
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return recipe


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Equal bits need equal thread counts, and small tests are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
