"""Training, evaluation and views on a CUDA device, against the same on the CPU: where one is, and skipped elsewhere.

Float32 without TF32 on both; products are added up in another order, so losses agree to a few digits and drift apart
as updates multiply the difference.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import fastssl
from fastssl.errors import UserError
from fastssl.runs import reading

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHOICES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "vicreg": {"loss": {"name": "vicreg"}},
    "sigreg": {"loss": {"name": "sigreg"}},
    "authors' loss": {"loss": {"form": "authors", "standardize": "joint", "l2_normalize": True}},
    "five views": {"augment": {"views": 5}},
    "multi-crop": {"augment": {"preset": "multicrop", "views": 4, "small_side_px": 8}},
    "statistics of a view": {"model": {"batch_norm": "per_view"}},
    "lars, accumulated, clipped": {"optim": {"name": "lars", "lr": 0.1, "accumulate_steps": 2, "clip_norm": 1.0}},
    "muon": {"optim": {"name": "muon"}},
    "sgd": {"optim": {"name": "sgd", "lr": 0.01}},
    "averaged": {"optim": {"ema": 0.9}},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "growing views": {"augment": {"progressive": {"from_px": 8}}},
    "images on the host": {"data": {"memory": "host"}},
    "images in the file": {"data": {"memory": "mmap"}},
    "views by torch": {"augment": {"backend": "torch"}},
    "every operation": {"augment": {"preset": "imagenet_asymmetric", "all": {"rotate_p": 0.5, "rotate_max_deg": 30}}},
    "no channels last": {"train": {"channels_last": False}},
    "one graph": {"train": {"cuda_graph": True}},
    "compiled": {"train": {"compile": True}},
    "compiled with graphs": {"train": {"compile": "reduce-overhead"}},
}
ONLY_ON_CUDA = ("cuda_graph", "compile")


def with_device(recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """For a CPU without what is a CUDA device's own, and in products of all bits."""
    train = {"tf32": False} | recipe["train"]
    if device == "cpu":
        train = {key: value for key, value in train.items() if key not in ONLY_ON_CUDA}
    return recipe | {"device": device, "train": train}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for event, line in reading.read_metrics(folder / "metrics.jsonl") if event == "step"]


@pytest.mark.parametrize("choice", CHOICES)
def test_losses_are_those_of_the_cpu(tiny_data: tuple[Path, Path], tmp_path: Path, choice: str):
    for name, device in (("ours", "cuda"), ("theirs", "cpu")):
        summary = fastssl.train(with_device(tiny(tiny_data, **CHOICES[choice]), device), run_dir=tmp_path / name)
        assert 0 <= summary["test_ridge_pct"] <= 100
    ours, theirs = losses(tmp_path / "ours"), losses(tmp_path / "theirs")
    assert len(ours) == 10
    assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(tiny_data: tuple[Path, Path], tmp_path: Path, precision: str):
    for name in (precision, "fp32"):
        recipe = with_device(tiny(tiny_data, train={"precision": name}), "cuda")
        assert fastssl.train(recipe, run_dir=tmp_path / name)["precision"] == name
    ours, theirs = losses(tmp_path / precision), losses(tmp_path / "fp32")
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert ours == pytest.approx(theirs, rel=0.5)


@pytest.mark.parametrize("choice", ["as it is", "sigreg", "averaged", "one graph", "images on the host"])
def test_stopped_and_resumed_equals_uninterrupted(tiny_data: tuple[Path, Path], tmp_path: Path, choice: str):
    class Pulled(Exception):  # noqa: N818
        pass

    def pull(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            raise Pulled

    recipe = with_device(tiny(tiny_data, **CHOICES[choice]), "cuda")
    recipe["train"] |= {"deterministic": True}
    fastssl.train(recipe, run_dir=tmp_path / "whole")
    with pytest.raises(Pulled):
        fastssl.train(recipe, run_dir=tmp_path / "parts", observe=pull)
    fastssl.train(recipe, run_dir=tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_is_evaluated_and_embeds_as_on_the_cpu(tiny_data: tuple[Path, Path], tmp_path: Path):
    fastssl.train(with_device(tiny(tiny_data), "cuda"), run_dir=tmp_path / "run")
    images = torch.randint(0, 256, (50, 16, 16, 3), dtype=torch.uint8)
    found, expected = (fastssl.load(tmp_path / "run", device=device).embed(images) for device in ("cuda", "cpu"))
    torch.testing.assert_close(torch.as_tensor(found).cpu(), torch.as_tensor(expected), rtol=2e-3, atol=2e-3)
    measured = []
    for device in ("cuda", "cpu"):
        command = [sys.executable, "-m", "fastssl", "eval", str(tmp_path / "run"), "--device", device, "--json"]
        command += ["--on", "test", "--probe", "knn,ridge"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        measured.append([row["pct"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]])
    assert measured[0] == pytest.approx(measured[1], abs=2)  # of 100 images


@pytest.mark.parametrize("preset", ["cifar", "imagenet", "multicrop"])
def test_views_of_a_loop_of_ones_own_are_those_of_the_cpu(tiny_data: tuple[Path, Path], preset: Any):
    kwargs: dict[str, Any] = {"batch_size": 50, "views": 4, "preset": preset, "side_px": 16}
    ours, theirs = (fastssl.views(tiny_data[0], device=device, **kwargs) for device in ("cuda", "cpu"))
    for _ in range(2):  # epochs
        for (a, labels_a, index_a), (b, labels_b, index_b) in zip(ours, theirs, strict=True):
            torch.cuda.synchronize()
            assert torch.equal(labels_a.cpu(), labels_b)
            assert torch.equal(index_a.cpu(), index_b)
            for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
                difference = (x.cpu() - y).abs()
                assert difference.quantile(0.999) < 2e-3
                assert difference.mean() < 1e-3


def test_no_memory_is_explained(tiny_data: tuple[Path, Path], tmp_path: Path):
    recipe = with_device(tiny(tiny_data, augment={"side_px": 224}, model={"width": 4.0}), "cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(UserError, match="Out of memory") as refused:
            fastssl.train(recipe, run_dir=tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "batch_size" in refused.value.fix


def test_one_rank_of_a_group_trains_as_one_process(tiny_data: tuple[Path, Path], tmp_path: Path):
    import yaml

    recipe = with_device(tiny(tiny_data), "cuda")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    fastssl.train(recipe, run_dir=tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "fastssl"]
    command += ["train", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "group")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"NCCL_DEBUG": "WARN"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "group") == pytest.approx(losses(tmp_path / "alone"), rel=1e-2)
