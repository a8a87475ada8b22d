"""Training as a user relies on it: same seed same losses, exact resume, labels never used, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import one_torch_thread
from tiny import tiny as smallest

import fastssl
from fastssl.errors import Interrupted, UserError
from fastssl.runs import checkpoint
from fastssl.training.guards import EXIT_CODE

TIMES = ("train_s", "images_per_s", "views_per_s", "load_pct", "views_pct")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without their timings."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(run_dir)


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Equal bits need equal thread counts, here and in processes started here, whatever other tests have imported."""
    with one_torch_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def reference(one_thread: None, tmp_path_factory: pytest.TempPathFactory, tiny_data: tuple[Path, Path]) -> Path:
    """A run of the tiny recipe, never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = tiny(tiny_data)
    fastssl.train(recipe, run_dir=folder / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "run"


def tiny(tiny_data: tuple[Path, Path], **sections: dict[str, Any]) -> dict[str, Any]:
    """Four epochs in bfloat16."""
    train = {"epochs": 4, "precision": "bf16"} | sections.pop("train", {})
    return smallest(tiny_data, train=train, **sections)


def test_a_run_leaves_what_it_promises(reference: Path) -> None:
    names = {p.name for p in reference.iterdir()}
    assert {"recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "summary.json", "checkpoints"} <= names
    records = metrics(reference)
    steps = [r for r in records if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 21))  # 160 images, 5 steps an epoch, 4 epochs
    assert [r["epoch"] for r in records if r["event"] == "evaluation"] == [1, 2, 3, 4]
    for r in steps:
        weight = 3.34 / 16
        assert r["loss"] == pytest.approx(r["invariance"] + weight * r["redundancy"], rel=1e-4)
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["images"] == 20 * 32
    assert summary["views"] == 2 * 20 * 32
    assert {"test_knn5_pct", "test_knn20_pct", "test_ridge_pct", "test_linear_pct"} <= summary.keys()
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_same_seed_same_losses_and_weights(reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    fastssl.train(tiny(tiny_data), run_dir=tmp_path)
    assert metrics(tmp_path) == metrics(reference)
    assert same_weights(tmp_path, reference)


def test_another_seed_gives_other_losses(reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    fastssl.train(tiny(tiny_data) | {"seed": 1}, run_dir=tmp_path)
    assert metrics(tmp_path)[0]["loss"] != metrics(reference)[0]["loss"]


def test_multicrop_resumes_bit_for_bit(one_thread: None, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    class Pulled(Exception):  # noqa: N818
        pass

    def pull(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            raise Pulled

    views = {"preset": "multicrop", "views": 4, "small_side_px": 8}
    recipe = tiny(tiny_data, augment=views, loss={"name": "sigreg"}, train={"epochs": 2})  # draws directions too
    summary = fastssl.train(recipe, run_dir=tmp_path / "whole")
    assert summary["views"] == 4 * 10 * 32  # small ones count as views too
    with pytest.raises(Pulled):
        fastssl.train(recipe, run_dir=tmp_path / "parts", observe=pull)
    fastssl.train(recipe, run_dir=tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_the_last_short_batch_is_trained_on_where_the_recipe_keeps_it(
    tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    data = {"drop_last": False, "batch_size": 48, "val_count": 0}
    recipe = smallest((tiny_data[0], None), data=data, evaluate={"every_epochs": 0}, train={"epochs": 1})
    summary = fastssl.train(recipe, run_dir=tmp_path / "run")
    assert (summary["steps"], summary["images"], summary["views"]) == (5, 200, 400)
    assert [r["images"] for r in metrics(tmp_path / "run") if r["event"] == "step"] == [48, 96, 144, 192, 200]
    data |= {"batch_size": 199}
    with pytest.raises(UserError, match="the last batch of 1 of 200 images does not divide"):
        fastssl.train(smallest((tiny_data[0], None), data=data), run_dir=tmp_path / "other")


@pytest.mark.parametrize("stop_after", [1, 7, 10, 19])
def test_stopped_and_resumed_equals_uninterrupted(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path, stop_after: int
) -> None:
    class Pulled(Exception):  # noqa: N818
        pass

    def pull(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == stop_after:
            raise Pulled

    with pytest.raises(Pulled):
        fastssl.train(tiny(tiny_data), run_dir=tmp_path, observe=pull)
    fastssl.train(tiny(tiny_data), run_dir=tmp_path, resume=True)
    assert metrics(tmp_path) == metrics(reference)
    assert same_weights(tmp_path, reference)


def test_sigterm_finishes_the_step_saves_and_says_so(reference: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    text = (reference.parent / "recipe.yaml").read_text()
    recipe.write_text(text.replace("epochs: 4", "epochs: 4000"))
    command = [sys.executable, "-m", "fastssl", "train", str(recipe), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE
    assert "--resume" in err
    found = checkpoint.latest(tmp_path / "run" / "checkpoints", warn=pytest.fail)
    assert found is not None
    last = [r for r in metrics(tmp_path / "run") if r["event"] == "step"][-1]
    assert last["step"] == found[2]["step"]


def test_a_damaged_checkpoint_does_not_displace_those_after_it(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    class Pulled(Exception):  # noqa: N818
        pass

    def train_up_to(step: int) -> list[str]:
        def pull(record: dict[str, Any]) -> None:
            if record["event"] == "step" and record["step"] == step:
                raise Pulled

        with pytest.raises(Pulled):
            fastssl.train(recipe, run_dir=tmp_path, observe=pull, resume=True)
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    recipe = tiny(tiny_data, train={"keep_checkpoints": 1, "checkpoint_every_steps": 2})
    assert train_up_to(9) == ["step-00000005", "step-00000008"]  # the best one, and the newest
    (tmp_path / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    assert train_up_to(7) == ["damaged-step-00000008", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("what", ["features", "linear probe"])
def test_a_signal_in_the_final_evaluation_ends_the_run_and_a_resume_repeats_nothing_else(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path, what: str
) -> None:
    def terminate(record: dict[str, Any]) -> None:
        if record["event"] == "progress" and record["what"] == what:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM after saving"):
        fastssl.train(tiny(tiny_data), run_dir=tmp_path, observe=terminate)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "failure.json").exists()
    seen: list[dict[str, Any]] = []
    summary = fastssl.train(tiny(tiny_data), run_dir=tmp_path, resume=True, observe=seen.append)
    assert not {"step", "evaluation"} & {record["event"] for record in seen}
    assert summary["test_linear_pct"] == json.loads((reference / "summary.json").read_text())["test_linear_pct"]
    assert metrics(tmp_path) == metrics(reference)
    assert same_weights(tmp_path, reference)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_resumed_equals_uninterrupted(reference: Path, tmp_path: Path) -> None:
    for attempt in range(5):
        run = tmp_path / f"run{attempt}"
        command = [sys.executable, "-m", "fastssl", "train", str(reference.parent / "recipe.yaml")]
        command += ["--run-dir", str(run), "--resume"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 7:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        if process.wait(timeout=60) == -signal.SIGKILL:
            break  # else it had ended before this process was given a moment
    else:
        pytest.fail("no run could be killed before its end")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 20
    assert metrics(run) == metrics(reference)
    assert same_weights(run, reference)


def test_labels_change_nothing_in_pretraining(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl import build

    honest = build.data.labels_of
    monkeypatch.setattr(build.data, "labels_of", lambda path: (honest(path) + 3) % 10)
    fastssl.train(tiny(tiny_data), run_dir=tmp_path)
    losses = [r["loss"] for r in metrics(tmp_path) if r["event"] == "step"]
    assert losses == [r["loss"] for r in metrics(reference) if r["event"] == "step"]


def test_held_out_images_are_never_trained_on(tiny_data: tuple[Path, Path]) -> None:
    from fastssl import build
    from fastssl.recipe.load import load

    recipe = load(tiny(tiny_data))
    labels = build.data.labels_of(recipe.data.path)
    sets = build.data.sets(recipe, labels, labels)
    assert len(sets.val) == 40
    assert not set(sets.val.tolist()) & set(sets.train.tolist())
    assert sorted(sets.val.tolist() + sets.train.tolist()) == list(range(200))
    loader = build.data.loader(recipe, recipe.data.path, sets.train, device=torch.device("cpu"))
    seen = {int(i) for batch in loader.epoch(0) for i in batch.index_B}
    assert seen <= set(sets.train.tolist())


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"name": "vicreg"}},
        {"loss": {"form": "authors", "standardize": "joint", "l2_normalize": True}},
        {"augment": {"views": 5}},
        {"augment": {"preset": "multicrop", "views": 4, "small_side_px": 8}},
        {"optim": {"name": "lars", "lr": 0.1, "accumulate_steps": 2, "clip_norm": 1.0}},
        {"optim": {"name": "sgd", "lr": 0.01, "schedule": "constant", "warmup_epochs": 0.5}},
        {"optim": {"name": "adam"}, "train": {"precision": "fp32", "channels_last": False}},
        {"data": {"fraction": 0.5}, "augment": {"backend": "torch"}},
    ],
    ids=lambda sections: "-".join(f"{k}:{v}" for section in sections.values() for k, v in section.items()),
)
def test_every_choice_trains_to_finite_losses(
    tiny_data: tuple[Path, Path], tmp_path: Path, sections: dict[str, Any]
) -> None:
    short = {"train": {"epochs": 1} | sections.get("train", {})}
    summary = fastssl.train(tiny(tiny_data, **(sections | short)), run_dir=tmp_path)
    assert all(np.isfinite(r["loss"]) for r in metrics(tmp_path) if r["event"] == "step")
    assert 0 <= summary["test_knn20_pct"] <= 100


@pytest.mark.parametrize(
    "data", [{"memory": "mmap"}, {"memory": "host"}, {"loader": "ffcv"}, {"loader": "dali"}], ids=str
)
def test_every_loader_gives_the_same_losses(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path, data: dict[str, Any]
) -> None:
    from fastssl.data.loaders.choose import installed

    package = {"ffcv": "ffcv", "dali": "nvidia.dali"}.get(data.get("loader", ""))
    if package and not installed(package):
        pytest.skip(f"{package} is not installed")
    seen: list[dict[str, Any]] = []
    fastssl.train(tiny(tiny_data, data=data), run_dir=tmp_path, observe=seen.append)
    assert metrics(tmp_path) == metrics(reference)
    assert data.get("loader", "resident") in seen[0]["loader"]


def test_a_loader_that_is_not_installed_names_its_extra(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("fastssl.build.data.installed", lambda package: False)
    with pytest.raises(UserError, match="not installed") as error:
        fastssl.train(tiny(tiny_data, data={"loader": "ffcv"}), run_dir=tmp_path / "run")
    assert "fastssl-vision[ffcv]" in error.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_compiled_losses_are_close_to_eager(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path, mode: bool | str
) -> None:
    """Also in the mode that replays CUDA graphs, which has to be harmless where there is no CUDA."""
    pytest.importorskip("torch._inductor")
    train = {"epochs": 1, "compile": mode}
    summary = fastssl.train(tiny(tiny_data, train=train, optim={"lr": 1e-9}), run_dir=tmp_path / "a")
    assert summary["compile_s"] > 0
    fastssl.train(tiny(tiny_data, train={"epochs": 1}, optim={"lr": 1e-9}), run_dir=tmp_path / "b")
    losses = [[r["loss"] for r in metrics(tmp_path / name) if r["event"] == "step"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_accumulation_over_identical_halves_is_the_same_step() -> None:
    from functools import partial

    from torch import nn

    from fastssl.losses import barlow_twins
    from fastssl.training.step import Step

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map = nn.Linear(12, 4)

        def forward(self, groups: Any) -> tuple[None, torch.Tensor]:
            return None, self.map(groups[0].flatten(2))

    loss = partial(
        barlow_twins, redundancy_weight=0.1, form="leave_one_out", standardize="per_view", l2_normalize=False
    )
    half = torch.randn(2, 8, 3, 2, 2)
    results = []
    for views, parts in ((half, 1), (torch.cat([half, half], 1), 2)):
        network = Linear()
        sgd = torch.optim.SGD(network.parameters(), lr=0.1)
        Step(network, loss, sgd, accumulate_steps=parts)((views,), 0.1)
        results.append(network.map.weight.detach())
    torch.testing.assert_close(results[0], results[1])


def test_a_folder_with_a_run_is_not_overwritten(reference: Path, tiny_data: tuple[Path, Path]) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        fastssl.train(tiny(tiny_data), run_dir=reference)
    with pytest.raises(UserError, match=r"optim\.lr"):
        fastssl.train(tiny(tiny_data, optim={"lr": 0.1}), run_dir=reference, resume=True)
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_evaluations_come_every_so_many_steps_too(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    fastssl.train(tiny(tiny_data, train={"epochs": 2}, evaluate={"every_steps": 3}), run_dir=tmp_path)
    evaluated = [r["step"] for r in metrics(tmp_path) if r["event"] == "evaluation"]
    assert evaluated == [3, 5, 6, 9, 10]  # every third step, and the ends of epochs of five


def test_resuming_a_finished_run_changes_nothing(reference: Path, tiny_data: tuple[Path, Path]) -> None:
    before = metrics(reference)
    summary = fastssl.train(tiny(tiny_data), run_dir=reference, resume=True)
    assert metrics(reference) == before
    assert summary["steps"] == 20


def test_changed_data_is_refused_with_both_digests(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    from fastssl.data.convert.convert import convert

    data = tmp_path / "train.beton"
    first = convert("shapes", data, side_px=16, count=200)
    recipe = tiny(tiny_data, data={"path": str(data)}, train={"epochs": 1})
    fastssl.train(recipe, run_dir=tmp_path / "run")
    second = convert("shapes", data, side_px=16, count=200, seed=9)
    with pytest.raises(UserError) as error:
        fastssl.train(recipe, run_dir=tmp_path / "run", resume=True)
    assert first.digest in error.value.what
    assert second.digest in error.value.what


def test_a_checkpoint_of_another_recipe_is_refused(
    reference: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"started with another recipe; model\.width differ"):
        fastssl.train(tiny(tiny_data, model={"width": 0.5}), run_dir=tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_weight_far_above_the_rule_is_warned_about_before_the_first_step(
    tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, weight, warned in (("a", 50.0, True), ("b", "auto", False)):
        seen: list[dict[str, Any]] = []
        recipe = tiny(tiny_data, loss={"redundancy_weight": weight}, train={"epochs": 1})
        fastssl.train(recipe, run_dir=tmp_path / name, observe=seen.append)
        before = seen[: next(i for i, r in enumerate(seen) if r["event"] == "step")]
        assert any("likely to collapse" in r.get("message", "") for r in before) is warned


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        fastssl.train(tiny(tiny_data, optim={"name": "sgd", "lr": 1e30}), run_dir=tmp_path)


def test_absent_data_of_a_known_source_is_converted_first(tmp_path: Path, tiny_data: tuple[Path, Path]) -> None:
    made: list[str] = []
    recipe = tiny(
        tiny_data,
        data={
            "source": "shapes",
            "path": str(tmp_path / "new" / "a.beton"),
            "test_path": str(tmp_path / "new" / "b.beton"),
            "side_px": 16,
            "count": 120,
            "test_count": 50,
        },
        train={"epochs": 1},
    )
    fastssl.train(recipe, run_dir=tmp_path / "run", convert_progress=lambda name, done, total: made.append(name))
    assert {Path(name).name for name in made} == {"a.beton", "b.beton"}
    assert json.loads((tmp_path / "new" / "b.beton.json").read_text())["count"] == 50


def test_unlabeled_images_train_without_evaluation(tmp_path: Path, tiny_data: tuple[Path, Path]) -> None:
    from PIL import Image

    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    recipe = tiny(tiny_data, data={"source": str(folder), "path": str(tmp_path / "flat.beton")}, train={"epochs": 1})
    del recipe["data"]["val_count"], recipe["data"]["test_path"]
    seen: list[dict[str, Any]] = []
    summary = fastssl.train(recipe, run_dir=tmp_path / "run", observe=seen.append)
    assert seen[0]["evaluated"] is False
    evaluations = [r for r in seen if r["event"] == "evaluation"]
    assert evaluations[-1]["rankme"] > 0  # figures that need no labels
    assert not [key for r in evaluations for key in r if key.endswith("_pct")]
    assert not [key for key in summary if key.startswith("test_")]


def test_probes_can_learn_from_another_file(tmp_path: Path, tiny_data: tuple[Path, Path]) -> None:
    train, test = tiny_data
    recipe = tiny(tiny_data, data={"path": str(test), "probe_path": str(train), "val_count": 50}, train={"epochs": 1})
    summary = fastssl.train(recipe, run_dir=tmp_path)
    assert summary["images"] == 96  # all 100 images of the file, in batches of 32
    assert [r for r in metrics(tmp_path) if r["event"] == "evaluation"]


def test_loaded_backbone_embeds_images_of_any_size(reference: Path) -> None:
    pretrained = fastssl.load(reference, device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    features = pretrained.embed(images)
    assert features.dtype == np.float32
    assert features.shape == (7, 32)
    np.testing.assert_allclose(features, pretrained.embed(images, batch_size=3), rtol=0.05, atol=0.02)
    mixed = pretrained.embed([images[0], np.zeros((20, 31, 3), np.uint8)])
    np.testing.assert_allclose(mixed[0], features[0], rtol=0.05, atol=0.02)
    for wrong in (images[..., :2], images.astype(np.float32), images[0], images[:0]):
        with pytest.raises(UserError):
            pretrained.embed(wrong)


def test_loading_what_is_not_a_run_is_explained(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        fastssl.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text((reference / "recipe.yaml").read_text())
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        fastssl.load(tmp_path)
    assert os.listdir(tmp_path)
