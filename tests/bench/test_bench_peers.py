"""The peers do the same job: equal first weights, views like ours, a loss that agrees, and a record of it all."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import one_torch_thread

sys.path.append(str(Path(__file__).parents[2] / "bench"))
sys.path.append(str(Path(__file__).parents[2] / "bench" / "peers"))
import loops
import tta_peers

from fastssl import build, losses
from fastssl.errors import UserError
from fastssl.recipe.load import load


@pytest.fixture(autouse=True)
def _one_thread():
    with one_torch_thread():
        yield


def needs(name: str) -> None:
    if name == "lightly":
        pytest.importorskip("lightly.transforms", reason="lightly is not installed")


@pytest.mark.parametrize("name", list(loops.LOOPS))
def test_every_loop_starts_from_the_same_weights_and_trains(name: str, tiny_recipe: dict[str, Any]):
    needs(name)
    recipe = load(tiny_recipe, ["train.epochs=1"])
    backbone, steps = loops.LOOPS[name](recipe, 0)
    first = build.model.network(recipe, in_channels=3, device=torch.device("cpu")).backbone.state_dict()
    assert all(torch.equal(first[key], value) for key, value in backbone.state_dict().items())
    assert list(steps) == [32] * 5  # 160 images to train on
    assert not torch.equal(first["conv1.weight"], backbone.conv1.weight)


@pytest.mark.parametrize("name", ["lightly", "plain torchvision"])
def test_a_peers_views_are_as_bright_and_as_varied_as_ours(name: str, tiny_recipe: dict[str, Any]):
    needs(name)
    recipe = load(tiny_recipe)
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self, inside: torch.nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.inside(x)

    network = build.model.network

    def spied(*arguments: Any, **named: Any) -> Any:
        made = network(*arguments, **named)
        made.backbone.conv1 = Spy(made.backbone.conv1)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.model, "network", spied)
        list(loops.LOOPS[name](recipe, 0)[1])
        theirs = torch.cat(seen)
        seen.clear()
        list(loops.fastssl(recipe, 0)[1])
    ours = torch.cat(seen)
    assert theirs.shape == ours.shape
    assert theirs.mean() == pytest.approx(float(ours.mean()), abs=0.15)
    assert theirs.std() == pytest.approx(float(ours.std()), rel=0.1)


def test_the_hand_written_loss_is_ours_for_two_views():
    z_VBD = torch.randn(2, 64, 8)
    ours = losses.barlow_twins(
        z_VBD, redundancy_weight=0.1, form="leave_one_out", standardize="per_view", l2_normalize=False
    )
    assert loops.barlow_twins(*z_VBD, 0.1) == pytest.approx(float(ours["loss"]), rel=1e-5)


def test_the_script_records_loops_speed_ups_and_the_fixed_batch(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def here(name: str, recipe: Any, arguments: Any) -> dict[str, Any] | None:
        if name == "lightly":
            return None
        options = {"every_steps": 2, "budget_s": 60.0, "workers": 0}
        return tta_peers.follow(name, recipe, target_pct=arguments.target, **options)

    monkeypatch.setattr(tta_peers, "in_a_process", here)
    monkeypatch.setattr(tta_peers, "WARMUP", 1)
    monkeypatch.setattr(tta_peers, "LARGER", ["model.width=0.5"])
    path, out = tmp_path / "tiny.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(tiny_recipe))
    tta_peers.main([str(path), "--target", "1", "--seeds", "2", "--fixed-s", "0.05", "--out", str(out)])
    made = json.loads(out.read_text())
    rows = {(r["impl"], r["metric"], r["work"]["backbone"]): r for r in made["rows"]}
    small = "resnet_tiny x0.25 patch2"
    assert rows["fastssl", "steps", small]["values"] == [3, 3]
    assert rows["plain torchvision", "train_s", small]["seeds"] == 2
    assert rows["fastssl, as trained", "time_against_fixed", small]["n"] == 25
    assert ("fastssl, as trained", "time_against_fixed", "resnet_tiny x0.5 patch2") in rows
    assert [(one["recipe"], one["against"]) for one in made["speed_ups"]] == [
        ("fastssl, Muon", "plain torchvision"),
        ("fastssl", "plain torchvision"),
    ]
    assert rows["fastssl, Muon", "views_per_s", small]["note"] == "optim.name=muon optim.lr=0.05"
    assert made["speed_ups"][0]["bound"] == "exact"
    assert "fastssl against plain torchvision" in capsys.readouterr().out


def test_a_cut_off_costs_one_run_and_resume_measures_the_rest(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured: list[tuple[str, int]] = []

    def two_runs(name: str, recipe: Any, arguments: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((name, recipe.seed))
        return {"curve": [{"train_s": 1.0, "steps": 3, "views": 9, "knn_pct": 50.0}], "views_per_s": [9.0]}

    path, out = tmp_path / "tiny.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(path), "--target", "1", "--seeds", "2", "--fixed-s", "0", "--out", str(out), "--resume"]
    words += ["--peers", "plain torchvision", "fastssl"]
    monkeypatch.setattr(tta_peers, "in_a_process", two_runs)
    monkeypatch.setattr(sys, "argv", ["tta_peers.py", *words])  # a record names its command
    with pytest.raises(KeyboardInterrupt):
        tta_peers.main(words)
    assert {name: len(runs) for name, runs in json.loads(out.read_text())["curves"].items()} == {
        "plain torchvision": 1,
        "fastssl": 1,
    }
    before, measured[:] = list(measured), []
    tta_peers.main(words)
    assert sorted(before + measured) == [(name, seed) for name in ("fastssl", "plain torchvision") for seed in (0, 1)]
    of_before = json.loads(out.read_text())
    del of_before["recipe"]["evaluate"]["whitened_knn"]  # a setting that came after the record
    out.write_text(json.dumps(of_before))
    measured[:] = []
    tta_peers.main(words)
    assert measured == []
    for change, what in (
        (["-s", "train.epochs=3"], "recipe"),
        (["--target", "2"], "target, budget"),
        (["--budget-s", "7"], "target, budget"),
        (["--every-steps", "7"], "target, budget"),
    ):
        with pytest.raises(UserError, match=f"another {what}"):
            tta_peers.main([*words, *change])
    made = json.loads(out.read_text())
    out.write_text(json.dumps(made | {"hardware": made["hardware"] | {"cpu": "another"}}))
    with pytest.raises(UserError, match="another machine"):  # seconds of two machines are no speed-up
        tta_peers.main(words)


def test_one_seed_has_no_interval_and_a_bound_is_called_one():
    one: dict[str, Any] = {"bound": "exact", "ratio": 6.052, "low": None, "high": None, "n": 1}
    assert tta_peers.sooner(one) == "at the target 6.05 times sooner (n = 1)"
    some = one | {"bound": "at least", "low": 5.0, "high": 7.0, "n": 3}
    assert tta_peers.sooner(some) == "at the target at least 6.05 times sooner (n = 3, 5.00 to 7.00 by bootstrap)"
    none = one | {"bound": "unknown", "ratio": None}
    assert tta_peers.sooner(none) == "neither reached the target with every seed"


@pytest.mark.parametrize("budget", ["0", "nan"])
def test_a_budget_in_which_nothing_trains_is_refused(budget: str):
    with pytest.raises(UserError, match=f"--budget-s is {budget}"):
        tta_peers.main(["--budget-s", budget])


def test_a_missing_peer_is_said(tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    arguments = tta_peers.parse(["--workers", "0", "--every-steps", "1"])
    assert tta_peers.in_a_process("nobody's", load(tiny_recipe), arguments) is None
    assert "nobody's is left out: KeyError" in capsys.readouterr().err


def test_a_recipe_that_the_peers_cannot_do_alike_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    for change, named in (("augment.all={rotate_p: 1.0}", "rotation"), ("augment.views=3", "two views")):
        with pytest.raises(SystemExit, match=named):
            tta_peers.main([str(path), "-s", change])
