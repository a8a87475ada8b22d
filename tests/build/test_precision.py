"""The precision of a run: what the device has instructions for, said once, kept by a resume, float32 for features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import fastssl
from fastssl import build
from fastssl.bench import tta
from fastssl.build import hardware
from fastssl.errors import UserError
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.recipe.load import load

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe(precision: str) -> Any:
    return load({"data": {"path": "x.beton"}, "device": "cpu", "train": {"epochs": 1, "precision": precision}})


def cpu_with(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(hardware.binding, "get_host_cpu_features", lambda: dict.fromkeys(features, True))


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx2", "fp32"), ("avx512f", "fp32"), ("avx512bf16", "bf16"), ("amx-bf16", "bf16"), ("bf16", "bf16")],
)
def test_auto_on_a_cpu(feature: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, feature)
    assert hardware.precision(recipe("auto")) == expected
    assert hardware.precision(recipe("fp16")) == "fp16"


def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert hardware.precision(recipe("auto"), CUDA) == expected


def test_features_are_never_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch)
    assert hardware.features_autocast(recipe("bf16"), CPU) is None
    assert hardware.features_autocast(recipe("fp16"), CPU) is None
    assert "computed in float32: this cpu has no instructions for bf16" in str(hardware.replaced(recipe("bf16"), CPU))
    assert hardware.replaced(recipe("auto"), CPU) is None
    cpu_with(monkeypatch, "amx-bf16")
    assert hardware.features_autocast(recipe("bf16"), CPU) is torch.bfloat16
    assert hardware.features_autocast(recipe("fp32"), CPU) is None


def test_eval_and_embed_say_what_replaces_a_runs_precision(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_with(monkeypatch)
    asked = tiny((tiny_data[0], None), data={"val_count": 0}, train={"precision": "bf16", "epochs": 1})
    fastssl.train(asked | {"augment": {"side_px": 8}}, run_dir=tmp_path / "run")
    judged = evaluate(tmp_path / "run", on="pretraining", device="cpu")
    assert judged["precision"] == "float32"
    assert any("no instructions for bf16" in warning for warning in judged["warnings"])
    embedded = embed(tmp_path / "run", "shapes", tmp_path / "f.npy", count=4)
    assert (embedded["precision"], "no instructions for bf16" in embedded["replaced"]) == ("float32", True)


def test_what_is_emulated_on_request_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch)
    assert "set train.precision to auto or fp32" in str(hardware.emulation(recipe("bf16"), CPU))
    assert hardware.emulation(recipe("auto"), CPU) is None
    assert hardware.emulation(recipe("fp32"), CPU) is None


def test_a_resume_on_another_machine_keeps_the_precision(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    asked = tiny((tiny_data[0], None), train={"precision": "auto", "epochs": 1}, optim={"schedule": "constant"})
    cpu_with(monkeypatch)
    assert fastssl.train(asked, run_dir=tmp_path, observe=seen.append)["precision"] == "fp32"
    assert seen[0]["precision"] == "fp32: cpu has no instructions for bfloat16"
    assert build.hardware.autocast(load(tmp_path / "recipe.yaml")) is None
    cpu_with(monkeypatch, "amx-bf16")
    assert tta.finished(tmp_path, load(asked), tta.Ends({}))  # and is not trained, nor refused, again
    for change in ("seed=1", "train.precision=bf16"):
        with pytest.raises(UserError, match="holds a run of another recipe"):
            tta.finished(tmp_path, load(asked, [change]), tta.Ends({}))
    asked["train"]["epochs"] = 2
    fastssl.train(asked, run_dir=tmp_path, resume=True, observe=seen.append)
    starts = [record for record in seen if record["event"] == "start"]
    assert starts[1]["precision"] == "fp32: as the run began"
