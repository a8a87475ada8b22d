"""Which checkpoint is judged, and what can be said of a run without labels."""

import json
import re
import shutil
from pathlib import Path

import command
import pytest
from tiny import tiny

import fastssl
from fastssl.errors import DamagedWarning, UserError
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.probes import table
from fastssl.runs import checkpoint

Data = tuple[Path, Path]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def unlabeled(tiny_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images without labels, of one epoch."""
    from PIL import Image

    from fastssl.data.beton.reader import Beton
    from fastssl.data.convert.convert import convert

    folder = tmp_path_factory.mktemp("unlabeled")
    (folder / "photos").mkdir()
    images = Beton(tiny_data[0])
    for i in range(64):
        Image.fromarray(images.image(i)).save(folder / "photos" / f"{i:02d}.png")
    convert(str(folder / "photos"), folder / "photos.beton")
    recipe = tiny((folder / "photos.beton", None), data={"val_count": 0}, train={"epochs": 1})
    fastssl.train(recipe, run_dir=folder / "run")
    return folder / "run"


def test_a_checkpoint_is_the_last_the_best_or_the_one_named(run: Path) -> None:
    first, last = sorted(path.name for path in (run / "checkpoints").iterdir())
    best = json.loads((run / "summary.json").read_text())["best"]["step"]
    assert fastssl.load(run).step == 10
    assert fastssl.load(run, checkpoint="best").step == best
    assert fastssl.load(run, checkpoint=first).step == fastssl.load(run / "checkpoints" / first).step == 5
    assert fastssl.load(run, checkpoint=run / "checkpoints" / last).step == 10
    with pytest.raises(UserError, match="no checkpoint worst") as error:
        fastssl.load(run, checkpoint="worst")
    assert first in error.value.fix
    other = shutil.copytree(run, run.parent / "other") / "checkpoints" / first
    with pytest.raises(UserError, match="is not a checkpoint of") as error:
        fastssl.load(run, checkpoint=other)
    assert first in error.value.fix


def test_the_record_tells_the_step_and_the_weights_are_that_steps(run: Path) -> None:
    first = checkpoint.path_of(run / "checkpoints", 5)
    record = evaluate(run, probes=["knn"], checkpoint=first, device="cpu")
    assert record["step"] == 5
    assert record["weights"] == fastssl.load(first).digest != fastssl.load(run).digest


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: Path) -> None:
    newest = checkpoint.path_of(run / "checkpoints", 10)
    (newest / checkpoint.WEIGHTS).write_bytes(b"damage")
    with pytest.warns(DamagedWarning, match=r"step-00000010.*Step 5 is used"):
        assert fastssl.load(run).step == 5
    done = command.fastssl("eval", str(run), "--probe", "knn", "--device", "cpu", timeout=600)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 1
    assert "Step 5 is used" in warnings[0]
    assert "checkpoint of step 5" in done.stdout


def test_without_labels_a_run_is_judged_by_the_figures_of_its_own_last_evaluation(unlabeled: Path) -> None:
    records = map(json.loads, (unlabeled / "metrics.jsonl").read_text().splitlines())
    last = [record for record in records if record["event"] == "evaluation"][-1]
    record = evaluate(unlabeled, device="cpu")
    assert (record["on"], record["rows"], record["judged"]["images"]) == ("pretraining", [], 64)
    figures = record["spectrum"]["backbone"]
    assert figures.pop("rankme_uncentered") > 0
    assert figures.keys() == {probe.key for probe in table.FIGURES if probe.key in last}
    assert figures == pytest.approx({key: last[key] for key in figures}, rel=1e-3, abs=1e-4)


def test_without_labels_there_is_no_best_checkpoint(unlabeled: Path) -> None:
    with pytest.raises(UserError, match="no accuracy was measured") as error:
        fastssl.load(unlabeled, checkpoint="best")
    assert "checkpoint='last'" in error.value.fix


def test_the_command_prints_figures_and_draws_neighbors_without_labels(unlabeled: Path) -> None:
    pytest.importorskip("matplotlib")
    done = command.fastssl("eval", str(unlabeled), "--device", "cpu", timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"RankMe \(centered\) \d.*RankMe \(uncentered\) \d", done.stdout)
    assert "n = 64" in done.stdout
    page = (unlabeled / "images" / "index.html").read_text()
    assert "Nearest neighbors" in page
    assert "Map of embeddings" in page


def test_at_another_side_no_page_is_drawn_and_that_is_said(unlabeled: Path) -> None:
    done = command.fastssl("eval", str(unlabeled), "--side-px", "24", "--device", "cpu", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "no page of images" in done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["side_px"], record["on"], "page" in record) == (24, "pretraining", False)
