"""`fastssl train my_photos/`: says what it will do, converts, writes a recipe, trains; a second time it uses both."""

import json
import shutil
from pathlib import Path

import command
import numpy as np
import pytest
from PIL import Image

from fastssl.bench.own_images import carry_out, name_of, plan_of
from fastssl.data.convert.convert import convert
from fastssl.errors import UserError

SMALL = ["model.backbone=resnet_tiny", "model.width=0.25", "train.epochs=1", "train.precision=fp32", "device=cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "my photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(48):
        Image.fromarray(rng.integers(0, 256, (40 + i, 70, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_images_in_place_of_a_recipe(photos: Path) -> None:
    changes = [word for change in SMALL for word in ("-s", change)]
    planned = command.fastssl("train", str(photos), "--dry-run", cwd=photos.parent)
    assert planned.returncode == 0, planned.stderr
    assert "1. convert it to data/my_photos.beton" in planned.stdout
    assert not (photos.parent / "data").exists()

    done = command.fastssl("train", str(photos), *changes, "--json", cwd=photos.parent)
    assert done.returncode == 0, done.stderr
    assert "2. write my_photos.yaml" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["run_dir"] == "runs/my_photos"
    assert {"my_photos.yaml", "data/my_photos.beton", "runs/my_photos/summary.json"} <= {
        str(path.relative_to(photos.parent)) for path in photos.parent.rglob("*")
    }
    written = (photos.parent / "my_photos.yaml").read_bytes()
    again = command.fastssl("train", str(photos), *changes, "--resume", cwd=photos.parent)
    assert again.returncode == 0, again.stderr
    assert "use data/my_photos.beton, which is there already" in again.stderr
    assert (photos.parent / "my_photos.yaml").read_bytes() == written


def test_changes_of_the_data_decide_the_conversion(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    (photos / "damaged.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"for `fastssl train` with -s data\.on_error=skip"):
        carry_out(plan_of("my photos"))  # type: ignore[arg-type]
    plan = plan_of(
        "my photos",
        ["data.on_error=skip", "data.side_px=32", "optim.warmup_epochs=5", "augment.progressive.from_px=32"],
    )
    assert plan is not None
    assert "convert it to data/my_photos.beton (32 px squares)" in plan.text()
    carry_out(plan)
    made = json.loads(Path("data/my_photos.beton.json").read_text())
    assert (made["count"], made["side_px"], made["skipped_count"]) == (48, 32, 1)
    assert plan_of("my photos", ["data.side_px=32"]) is not None
    with pytest.raises(UserError, match=r"was made with side_px 32, not 64"):
        plan_of("my photos", ["data.side_px=64"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["optim.lrr=1", "nonsense=2"], "2 problems: optim.lrr is unknown"),
        (["train.epochs=many"], "train.epochs is 'many'"),
        (["data.path=other.beton"], "-s data.path is given, and the images to train on are given"),
        (["data.source=cifar10"], "-s data.source is given"),
    ],
)
def test_changes_are_checked_before_anything_is_made(photos: Path, changes: list[str], named: str) -> None:
    words = [word for change in changes for word in ("-s", change)]
    done = command.fastssl("train", str(photos), *words, "--dry-run", cwd=photos.parent)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 2)
    assert named in done.stderr
    assert not (photos.parent / "data").exists()


def test_other_images_of_the_same_name_are_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies under the names of the plan is used for the images that it was made of, and for no others."""
    monkeypatch.chdir(photos.parent)
    plan = plan_of("my photos")
    assert plan is not None
    carry_out(plan)
    same = plan_of(str(photos))
    assert same is not None
    assert "use data/my_photos.beton, which is there already (48 images)" in same.text()
    shutil.copytree(photos, photos.parent / "b" / "my photos")
    done = command.fastssl("train", "b/my photos", "--dry-run", cwd=photos.parent)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 2)
    assert "data/my_photos.beton was made from my photos, not from b/my photos" in done.stderr
    assert "fastssl convert 'b/my photos' data/OTHER.beton" in done.stderr

    convert("shapes", "b/my_photos.beton", count=8)
    with pytest.raises(UserError, match=r"my_photos\.yaml trains on data/my_photos\.beton, not on b/my_photos\.beton"):
        plan_of("b/my_photos.beton")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos.v1", "photos_v1"),
        ("photos.v2.tar.gz", "photos_v2"),
        ("a.b.CSV", "a_b"),
        ("x.beton", "x"),
        ("é!", "é"),
        ("-a", "a"),
    ],
)
def test_a_name_loses_the_suffixes_of_data_alone(source: str, name: str) -> None:
    assert name_of(Path("somewhere") / source) == name


def test_a_folder_without_images_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    done = command.fastssl("train", "notes", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()[-2:]) == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_ranks_are_sent_to_convert_first(photos: Path) -> None:
    done = command.fastssl("train", str(photos), cwd=photos.parent, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert "fastssl convert" in done.stderr
