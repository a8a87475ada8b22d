"""A run's data after a change of folder, and after it moved: found by its recorded place, or one message for all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import command
import pytest
from tiny import tiny

import fastssl
from fastssl.errors import UserError
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.report import report

Data = tuple[Path, Path]


@pytest.fixture
def project(tiny_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data/train.beton and runs/tiny, of one epoch, which is the current one."""
    (tmp_path / "data").mkdir()
    for suffix in ("", ".json"):
        shutil.copy(f"{tiny_data[0]}{suffix}", tmp_path / f"data/train.beton{suffix}")
    monkeypatch.chdir(tmp_path)
    recipe = tiny((Path("data/train.beton"), None), train={"epochs": 1}, evaluate={"knn_k": [5], "linear_epochs": 0})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    fastssl.train("tiny.yaml", progress=False)
    return tmp_path


def figures(run: Path) -> dict[str, Any]:
    record = evaluate(run, probes=["knn"], device="cpu")
    return {key: record[key] for key in ("rows", "spectrum", "on")}


def test_from_another_folder_the_recorded_place_is_taken(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project / "runs" / "tiny"
    place = json.loads((run / "data.json").read_text())["files"]["path"]
    assert (place["given"], place["absolute"]) == ("data/train.beton", str(project / "data" / "train.beton"))
    before, recipe = figures(run), (run / "recipe.yaml").read_bytes()
    elsewhere = project / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert figures(run) == before
    fastssl.convert("shapes", "data/train.beton", count=40, side_px=16)  # another file at the path as given
    assert figures(run) == before
    events: list[dict[str, Any]] = []
    summary = fastssl.train(project / "tiny.yaml", run_dir=run, resume=True, observe=events.append)
    assert summary["steps"] == 5
    assert any(str(project / "data" / "train.beton") in event.get("message", "") for event in events)
    assert (run / "recipe.yaml").read_bytes() == recipe
    assert json.loads((run / "data.json").read_text())["files"]["path"] == place


def test_verbs_that_take_the_recipe_of_a_run_find_its_data_from_any_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    recipe = "../runs/tiny/recipe.yaml"
    done = command.fastssl("preview", recipe, "--images", "1", "-s", "augment.backend=torch")
    assert (done.returncode, done.stdout.split()[0]) == (0, "preview.png"), done.stderr
    place = project / "data" / "train.beton"
    assert done.stderr.count(f"Warning: data.path data/train.beton is {place}, as when the run trained.") == 1
    done = command.fastssl("doctor", recipe, "--json")
    assert json.loads(done.stdout)["stages"], done.stderr
    done = command.fastssl("bench", "loader", recipe, "--seconds", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    done = command.fastssl("preview", recipe, "-s", "data.path=data/other.beton")
    assert (done.returncode, "data/other.beton does not exist" in done.stderr) == (2, True), done.stderr


def test_one_message_says_what_to_do_when_the_data_moved(project: Path) -> None:
    run = Path("runs/tiny")
    before = figures(run)
    shutil.move(project / "data", project / "moved")
    printed = set()
    for verb in (
        lambda: evaluate(run, device="cpu"),
        lambda: evaluate(run, on="pretraining", device="cpu"),
        lambda: fastssl.train("tiny.yaml", resume=True),
    ):
        with pytest.raises(UserError) as error:
            verb()
        printed.add((error.value.what, error.value.fix))
    ((what, fix),) = printed
    assert what == f"data/train.beton does not exist; runs/tiny was trained with {project}/data/train.beton."
    skipped = report([run], "page")["skipped"]
    assert len(skipped) == 2
    assert all(what in line and "data.path into runs/tiny/recipe.yaml" in line for line in skipped)
    for words in (["eval", "runs/tiny"], ["train", "tiny.yaml", "--resume"]):
        done = command.fastssl(*words)
        assert (done.returncode, done.stderr.strip().splitlines()[-2:]) == (2, [f"Error: {what}", fix])

    recipe = (run / "recipe.yaml").read_text()  # what the message asks for
    (run / "recipe.yaml").write_text(recipe.replace("data/train.beton", "moved/train.beton"))
    assert figures(run) == before
    assert fastssl.train(run / "recipe.yaml", run_dir=run, resume=True, progress=False)["steps"] == 5
    place = json.loads((run / "data.json").read_text())["files"]["path"]
    assert place["absolute"] == str(project / "moved" / "train.beton")


def test_a_resume_takes_the_runs_own_images_alone(project: Path) -> None:
    fastssl.convert("shapes", "other.beton", count=200, side_px=16, seed=1)
    recipe = json.loads((project / "tiny.yaml").read_text())
    with pytest.raises(UserError, match=r"other\.beton has changed: its digest was"):
        fastssl.train(recipe | {"data": recipe["data"] | {"path": "other.beton"}}, resume=True)
    with pytest.raises(UserError, match=r"data\.test_path differ"):
        fastssl.train(recipe | {"data": recipe["data"] | {"test_path": "data/train.beton"}}, resume=True)
    os.link("data/train.beton", "linked.beton")
    shutil.copy("data/train.beton.json", "linked.beton.json")
    moved = recipe | {"data": recipe["data"] | {"path": "linked.beton"}}
    assert fastssl.train(moved, resume=True)["steps"] == 5
