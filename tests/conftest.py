"""Shared: the repository, the real images when they are there, and a recipe small enough to train in a second."""

import itertools
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import command
import pytest
from tiny import tiny

# before torch is imported: where others use the cores too, such as pytest's other workers, an operator on several
# threads waits for a core at each end
os.environ.setdefault("OMP_NUM_THREADS", "1")
# started in the background by a script, which ignores Ctrl-C: the processes of tests would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
CIFAR_ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"

SLOW = frozenset((ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split())


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-xdist starts its workers: one server of commands for all of them."""
    if not hasattr(config, "workerinput") and getattr(config.option, "numprocesses", None):
        os.environ[command.ADDRESS] = command.begin()


LONGEST = (ROOT / "tests" / "longest.txt").read_text(encoding="utf-8").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what slow.txt names: whole files, and tests with all their parameters; and deals the files."""
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in SLOW or test.partition("::")[0] in SLOW:
            item.add_marker(pytest.mark.slow)
    items[:] = dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in the order in which pytest-xdist gives each worker one stretch.

    Every stretch begins with its share of the files that take longest, in the order of longest.txt: at the end they
    would leave all workers but one idle.
    """
    by_file = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        by_file[item.nodeid.partition("::")[0]].append(item)
    stretches: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for i, file in enumerate(file for file in LONGEST if file in by_file):
        stretches[i % workers] += by_file.pop(file)
    rest = list(itertools.chain.from_iterable(by_file.values()))
    for number, stretch in enumerate(stretches, 1):
        room = len(rest) if number == workers else max(0, len(items) // workers - len(stretch))
        stretch += rest[:room]
        del rest[:room]
    return list(itertools.chain.from_iterable(stretches))


@pytest.fixture(scope="session")
def cifar_archive() -> Path:
    if not CIFAR_ARCHIVE.exists():
        pytest.skip(f"the real images are absent: {CIFAR_ARCHIVE.name} is not in shared/data next to the repository")
    return CIFAR_ARCHIVE


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 training and 100 test shapes of 16 px."""
    from fastssl.data.convert.convert import convert

    folder = tmp_path_factory.mktemp("tiny")
    paths = folder / "train.beton", folder / "test.beton"
    for path, split, count in zip(paths, ("train", "test"), (200, 100), strict=True):
        convert("shapes", path, split=split, side_px=16, count=count)
    return paths


@pytest.fixture
def tiny_recipe(tiny_data: tuple[Path, Path]) -> dict[str, Any]:
    return tiny(tiny_data)


@pytest.fixture(scope="session")
def finished_run(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that took two epochs, with evaluations, checkpoints and a summary."""
    from fastssl.training.loop import train

    folder = tmp_path_factory.mktemp("runs") / "first"
    train(tiny(tiny_data), run_dir=folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that has no test set."""
    from fastssl.training.loop import train

    folder = tmp_path_factory.mktemp("run") / "tiny"
    train(tiny((tiny_data[0], None), train={"epochs": 1}, evaluate={"knn_k": [5]}), run_dir=folder)
    return folder


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "FASTSSL_TRACEBACK"):  # typer takes them for a terminal
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    os.environ.setdefault("PYTHONWARNINGS", "default")
