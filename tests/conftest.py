"""Shared: the repository, the real images when they are there, and a recipe small enough to train in a second."""

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CIFAR_ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"


@pytest.fixture(scope="session")
def cifar_archive() -> Path:
    if not CIFAR_ARCHIVE.exists():
        pytest.skip(f"the real images are absent: {CIFAR_ARCHIVE.name} is not in shared/data beside the repository")
    return CIFAR_ARCHIVE


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 training and 100 test shapes of 16 px."""
    from fastssl.data.convert import convert

    folder = tmp_path_factory.mktemp("tiny")
    paths = folder / "train.beton", folder / "test.beton"
    for path, split, count in zip(paths, ("train", "test"), (200, 100), strict=True):
        convert("shapes", path, split=split, side_px=16, count=count)
    return paths


@pytest.fixture
def tiny_recipe(tiny_data: tuple[Path, Path]) -> dict[str, Any]:
    train, test = tiny_data
    return {
        "name": "tiny",
        "device": "cpu",
        "data": {"path": str(train), "test_path": str(test), "val_count": 40, "batch_size": 32},
        "augment": {"side_px": 16, "views": 2},
        "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [16, 16]},
        "optim": {"lr": 0.002},
        "train": {"epochs": 2, "precision": "fp32", "log_every_steps": 1},
        "evaluate": {"linear_epochs": 2, "knn_k": [5, 20]},
    }


@pytest.fixture(scope="session")
def finished_run(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that took two epochs, with evaluations, checkpoints and a summary."""
    train_path, test_path = tiny_data
    from fastssl.training import train

    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe = {
        "name": "tiny",
        "device": "cpu",
        "data": {"path": str(train_path), "test_path": str(test_path), "val_count": 40, "batch_size": 32},
        "augment": {"side_px": 16, "views": 2},
        "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [16, 16]},
        "train": {"epochs": 2, "precision": "fp32", "log_every_steps": 1},
        "evaluate": {"linear_epochs": 2, "knn_k": [5, 20]},
    }
    train(recipe, run_dir=folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on 16 px shapes."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    import fastssl

    fastssl.train(
        {
            "name": "tiny",
            "device": "cpu",
            "data": {"path": str(tiny_data[0]), "val_count": 40, "batch_size": 32},
            "augment": {"side_px": 16},
            "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [16, 16]},
            "train": {"epochs": 1, "precision": "fp32"},
            "evaluate": {"linear_epochs": 0, "knn_k": [5]},
        },
        run_dir=folder,
    )
    return folder


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "FASTSSL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    os.environ.setdefault("PYTHONWARNINGS", "default")
