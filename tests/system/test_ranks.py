"""Real gloo processes train as one does: the same losses, samples and weights, also after stops and kills."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from command import fastssl, start
from tiny import tiny

import fastssl as package
from fastssl import build, losses
from fastssl.build import ranks
from fastssl.errors import UserError
from fastssl.models import backbones, pretrainer
from fastssl.recipe.load import load
from fastssl.runs import checkpoint
from fastssl.training import distributed
from fastssl.training.guards import EXIT_CODE
from fastssl.training.loop import train as train_here
from fastssl.training.step import Step

STEPS, BATCH = 10, 8
BARLOW = partial(
    losses.barlow_twins, redundancy_weight=0.1, form="leave_one_out", standardize="per_view", l2_normalize=False
)
JOBS = {
    "barlow_twins": (BARLOW, 1),
    "vicreg": (partial(losses.vicreg, invariance_weight=5.0, variance_weight=5.0, covariance_weight=1.0), 1),
    "accumulated": (BARLOW, 2),
}


def trained(loss: Any, accumulate_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of ten float64 steps on this rank's share of each batch, and the weights afterwards."""
    torch.manual_seed(3)
    backbone = backbones.backbone("resnet_tiny", stem="patch2", width=0.25, in_channels=3)
    network = pretrainer.Pretrainer(backbone, pretrainer.projector(backbone.features_dim, widths=[6, 6])).double()
    distributed.synchronize_batch_norm(network, torch.device("cpu"))
    called = distributed.data_parallel(network, torch.device("cpu"))
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    mine, found = ranks.shard(BATCH), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        views_VBCHW = torch.randn(3, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        clip_norm = 0.5 if step % 3 == 0 else None
        take = Step(called, loss, sgd, accumulate_steps=accumulate_steps, clip_norm=clip_norm)
        terms = take((views_VBCHW[:, mine.start : mine.stop],), 0.1)
        found.append(float(terms["loss"]))
    return found, {name: tensor.clone() for name, tensor in network.state_dict().items()}


def gradients() -> dict[str, torch.Tensor]:
    """Of 10,000 weights, each rank's own and their mean over ranks, sent as they are and rounded."""
    own = torch.randn(10_000, generator=torch.Generator().manual_seed(ranks.rank()))
    found = {"own": own}
    for compression in ("none", "bf16"):
        network = torch.nn.Linear(10_000, 1, bias=False)
        called = distributed.data_parallel(network, torch.device("cpu"), compression=compression)
        called(own).sum().backward()
        assert network.weight.grad is not None
        found[compression] = network.weight.grad[0]
    return found


class Partial(torch.nn.Module):
    """Has a layer that its forward does not use, and a norm that averages over all its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.used(x))
        return y


def trained_partial() -> dict[str, torch.Tensor]:
    """Weights and statistics after three steps on this rank's share of each batch."""
    torch.manual_seed(0)
    network, mine = Partial().double(), ranks.shard(BATCH)
    distributed.synchronize_batch_norm(network, torch.device("cpu"))
    called = distributed.data_parallel(network, torch.device("cpu"), may_leave_out=True)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        rows = torch.randn(BATCH, 4, dtype=torch.float64)[mine.start : mine.stop]
        (ranks.all_sum(called(rows).pow(3).sum()) / BATCH).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=True)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


class Flattened(torch.nn.Module):
    """A backbone from Python with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = torch.nn.Linear(768, 8), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h_NF: torch.Tensor = self.used(x.flatten(1))
        return h_NF


def own_backbone_losses(recipe: dict[str, Any], run: Path) -> list[float]:
    """Of the steps of one epoch, as rank 0 logs them."""
    short = recipe | {"train": recipe["train"] | {"epochs": 1}, "model": {"projector": [8]}}
    seen = list[dict[str, Any]]()
    train_here(short, run_dir=run, backbone=Flattened(), observe=seen.append)
    return [record["loss"] for record in seen if record["event"] == "step"]


def samples(recipe: dict[str, Any]) -> list[list[int]]:
    """Which images each step of two epochs trains on, over all ranks."""
    made = load(recipe)
    sets = build.data.sets(made, build.data.labels_of(made.data.path), build.data.labels_of(made.data.path))
    loader = build.data.loader(made, made.data.path, sets.train, device=torch.device("cpu"))
    return [ranks.gather_rows(batch.index_B).tolist() for epoch in range(2) for batch in loader.epoch(epoch)]


def worker(rank: int, world: int, port: int, folder: str, recipe: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    early = package.views(recipe["data"]["path"], batch_size=BATCH, views=2, device="cpu")
    ranks.start("cpu", timeout_s=240)
    found: dict[str, Any] = {
        name: trained(partial(loss, all_sum=ranks.all_sum), parts) for name, (loss, parts) in JOBS.items()
    }
    try:
        next(iter(early))
        refused = ""
    except UserError as error:
        refused = error.what
    run = Path(folder) / "run"
    losses_of_own = own_backbone_losses(recipe, run)
    more = {"refused": refused, "own": losses_of_own}
    more |= {"samples": samples(recipe), "gradients": gradients(), "partial": trained_partial()}
    torch.save({**found, **more}, Path(folder) / f"{rank}.pt")
    ranks.stop()


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(
    request: pytest.FixtureRequest, tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What `worker` saved on each of 2 or 4 ranks."""
    world, folder = request.param, tmp_path_factory.mktemp("workers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "fastssl.build"])
    arguments = (world, port, str(folder), tiny(tiny_data))
    mp.start_processes(worker, args=arguments, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_ten_float64_steps_and_their_samples_are_one_processs(
    of_ranks: list[dict[str, Any]], tiny_recipe: dict[str, Any]
) -> None:
    for name, (loss, parts) in JOBS.items():
        # in parts, a rank's part is not the same images as one process's: there ranks are compared with each other
        expected_losses, expected = trained(loss, parts) if parts == 1 else of_ranks[0][name]
        assert expected_losses[0] != pytest.approx(expected_losses[-1], rel=1e-3)
        for rank in of_ranks:
            assert rank[name][0] == pytest.approx(expected_losses, rel=1e-10)
            for key, tensor in rank[name][1].items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10)
    assert all(rank["samples"] == samples(tiny_recipe) for rank in of_ranks)


def test_views_made_before_the_group_are_refused_by_every_rank(of_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(of_ranks):
        assert found["refused"].startswith(f"This is rank {rank} of {len(of_ranks)}, and fastssl.views(...) was called")


def test_a_backbone_from_python_with_an_unused_layer_trains_as_in_one_process(
    of_ranks: list[dict[str, Any]], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    expected = own_backbone_losses(tiny_recipe, tmp_path / "run")
    assert len(expected) > 3
    assert of_ranks[0]["own"] == pytest.approx(expected, rel=1e-5)


def test_unused_layers_and_norms_without_momentum_train_as_in_one_process(of_ranks: list[dict[str, Any]]) -> None:
    expected = trained_partial()
    for rank in of_ranks:
        for key, tensor in rank["partial"].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10)


def test_compressed_gradients_are_the_mean_but_for_bfloat16s_roundings(of_ranks: list[dict[str, Any]]) -> None:
    """One of each rank's and one of each sum: 2^-8 of what is rounded, which the ranks' sizes bound."""
    found = [rank["gradients"] for rank in of_ranks]
    mean, size = (torch.stack([x["own"] for x in found]).mean(0), torch.stack([x["own"].abs() for x in found]).mean(0))
    for rank in found:
        torch.testing.assert_close(rank["none"], mean)
        assert torch.equal(rank["bf16"], found[0]["bf16"])
        assert torch.equal(rank["bf16"], rank["bf16"].bfloat16().float())
        assert ((rank["bf16"] - mean).abs() <= len(found) * 2**-8 * 1.02 * size).all()


@pytest.fixture(scope="module")
def recipe(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "tiny.yaml"
    tree = tiny(
        tiny_data,
        data={"val_count": 41},  # which does not divide over the ranks
        optim={"lr": 0.0005},
        train={"epochs": 5, "checkpoint_every_steps": 3},
        evaluate={"linear_epochs": 0, "knn_k": [5]},
    )
    path.write_text(yaml.safe_dump(tree))
    return path


def command(recipe: Path, run: Path, ranks: int, *options: str) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options, "-m"]
    words = ["fastssl", "train", str(recipe), "--run-dir", str(run), "--resume", "--json"]
    return [sys.executable, "-m", *torchrun, *words]


def by_hand(world: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many ranks of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    alike["LOCAL_WORLD_SIZE"] = str(world)
    return [alike | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def train(*words: str) -> dict[str, Any]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=540, env=one_thread())
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def records(run: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def column(run: Path, name: str, event: str = "step") -> list[float]:
    return [record[name] for record in records(run, event)]


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never stopped: 4 steps an epoch, 20 in all."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = fastssl("train", str(recipe), "--run-dir", str(run), env=one_thread())
    assert done.returncode == 0, done.stderr
    return run


def wait_for_steps(process: "subprocess.Popen[bytes]", run: Path, steps: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(records(run)) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run never came to step {steps} (exit code {process.poll()})")


def test_two_ranks_under_torchrun_train_as_one(recipe: Path, alone: Path, tmp_path: Path) -> None:
    summary = train(*command(recipe, tmp_path / "run", 2))
    assert column(tmp_path / "run", "step") == list(range(1, 21))
    assert column(tmp_path / "run", "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
    assert column(tmp_path / "run", "knn5_pct", "evaluation") == column(alone, "knn5_pct", "evaluation")
    assert summary["images"] == 20 * 32


def test_a_run_of_four_ranks_stopped_by_a_signal_goes_on_with_two(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(recipe, run, 4), env=one_thread(), stderr=subprocess.PIPE)
    wait_for_steps(process, run, 4)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "--run-dir" in child.cmdline():
            child.send_signal(signal.SIGTERM)
            break  # one rank is signaled; all of them agree to stop
    _, printed = process.communicate(timeout=300)
    assert f"exitcode  : {EXIT_CODE}" in printed.decode(), printed.decode()[-3000:]
    found = checkpoint.latest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found[2]["ranks"] == 4
    assert found[2]["step"] == len(records(run)) < 20
    train(*command(recipe, run, 2))
    assert column(run, "step") == list(range(1, 21))
    assert column(run, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)


def test_a_run_whose_threads_share_views_goes_on_with_two_ranks(recipe: Path, tmp_path: Path) -> None:
    """Ranks share operators; what was copied to each view's thread has to be one network again."""
    run, changed = tmp_path / "run", tmp_path / "views.yaml"
    tree = yaml.safe_load(recipe.read_text())
    changes = {"model": {"batch_norm": "per_view"}, "train": {"epochs": 2, "keep_checkpoints": 9, "parallel": "views"}}
    changed.write_text(yaml.safe_dump(tree | {key: tree[key] | new for key, new in changes.items()}))
    assert fastssl("train", str(changed), "--run-dir", str(run), env=one_thread()).returncode == 0
    assert json.loads((run / "summary.json").read_text())["parallel"] == "views"
    whole = column(run, "loss")
    (run / "summary.json").unlink()
    for path in checkpoint.existing(run / "checkpoints"):
        if checkpoint.steps_in(path) > 3:
            shutil.rmtree(path)
    done = train(*command(changed, run, 2))
    assert done["parallel"] == "operators"
    assert column(run, "loss") == pytest.approx(whole, rel=1e-4)


def test_a_killed_rank_is_started_again_and_nothing_is_lost(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(recipe, run, 2, "--max-restarts", "1"), env=one_thread(), stderr=subprocess.DEVNULL
    )
    wait_for_steps(process, run, 7)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "--run-dir" in c.cmdline()]
    workers[-1].kill()
    assert process.wait(timeout=400) == 0
    assert column(run, "step") == list(range(1, 21))
    assert column(run, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
    assert (run / "summary.json").exists()


def test_a_batch_that_does_not_divide_over_the_ranks_names_two_that_do(recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["batch_size"] = 33
    odd = tmp_path / "odd.yaml"
    odd.write_text(yaml.safe_dump(tree))
    words = ("train", str(odd), "--run-dir", str(tmp_path / "run"))
    for process in [start(*words, env=one_thread() | environment) for environment in by_hand(2)]:
        printed = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 2
        assert "does not divide over 2 ranks" in printed
        assert "Set data.batch_size to 32 or 34." in printed
    assert not (tmp_path / "run" / "recipe.yaml").exists()
