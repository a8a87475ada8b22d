"""Progressive resolution: the schedule in closed form, views of its sides, and a resume across a change of side."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_torch_thread, tiny
from typer.testing import CliRunner

import fastssl
from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.cli import app
from fastssl.errors import UserError
from fastssl.recipe import progressive
from fastssl.recipe.load import load
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.runs import checkpoint

MINIMAL = {"data": {"path": "x.beton"}, "train": {"epochs": 8}}
GROWING = "augment.progressive={from_px: 8, until: 1, step_px: 4}"  # 8, 8, 12, 16 px over four epochs
TIMES = {"train_s", "images_per_s", "views_per_s", "load_pct", "views_pct"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_torch_thread():
        yield


def recipe_of(*changes: str) -> Recipe:
    return load(MINIMAL, changes)


@pytest.mark.parametrize(
    ("spec", "epochs", "sides"),
    [
        ("{from_px: 16, until: 0.75, step_px: 8}", 8, [16, 16, 16, 24, 24, 24, 32, 32]),
        ("{from_px: 16, until: 0.5, step_px: 4}", 8, [16, 20, 24, 28, 32, 32, 32, 32]),
        ("{from_px: 20, until: 1, step_px: 8}", 4, [20, 20, 28, 32]),  # full in the last epoch, whatever `until` says
        ("{from_px: 8, until: 0.01, step_px: 1}", 3, [8, 32, 32]),
        ("{from_px: 31, until: 0.1, step_px: 1}", 30, [31] * 3 + [32] * 27),  # 0.1 * 30 is above 3
    ],
)
def test_the_side_is_a_closed_form_of_the_epoch(spec: str, epochs: int, sides: list[int]):
    augment = recipe_of(f"augment.progressive={spec}", f"train.epochs={epochs}").augment
    assert [progressive.largest_side_px(augment, epoch, epochs) for epoch in range(epochs)] == sides
    assert progressive.sides_px(augment, epochs) == sorted(set(sides))


def test_off_by_default_and_then_the_full_table():
    recipe = recipe_of()
    assert recipe.augment.progressive is None
    assert progressive.views_of_epoch(recipe.augment, 0, 8) == view_table(recipe.augment)


def test_small_views_keep_their_side_until_it_is_above_the_largest():
    changes = ["augment.preset=multicrop", "augment.views=4", "augment.side_px=96", "augment.small_side_px=40"]
    augment = recipe_of(*changes, "augment.progressive={from_px: 32, step_px: 32}").augment
    sides = [[row.side_px for row in progressive.views_of_epoch(augment, e, 8)] for e in (0, 3, 6)]
    assert sides == [[32, 32, 32, 32], [64, 64, 40, 40], [96, 96, 40, 40]]
    first, full = progressive.views_of_epoch(augment, 0, 8)[0], view_table(augment)[0]
    assert first.blur_sigma_max_px == pytest.approx(full.blur_sigma_max_px / 3)  # the same picture, smaller
    assert first.model_dump(exclude={"side_px", "blur_sigma_min_px", "blur_sigma_max_px"}) == full.model_dump(
        exclude={"side_px", "blur_sigma_min_px", "blur_sigma_max_px"}
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["augment.progressive={from_px: 32}"], "from_px 32 is not below the views' side of 32"),
        (
            ["augment.progressive={from_px: 8, step_px: 1}", "train.epochs=50"],
            "25 sides, more than 8: set step_px to 4",
        ),
        (["augment.progressive={from_px: 16}", "augment.all={crop: pad}"], "crop pad would cut them smaller"),
        (["augment.progressive={from_px: 16}", "train.epochs=1"], "no effect on a single epoch"),
        (["augment.progressive={from_px: 16, until: 0}"], "augment.progressive.until is 0"),
        (["augment.progressive={form_px: 16}"], "form_px is unknown (did you mean from_px?"),
        (["augment.progressive={from_px: 40}", "optim.warmup_epochs=9"], "2 problems"),
    ],
)
def test_what_cannot_be_is_told_with_all_else(changes: list[str], named: str):
    with pytest.raises(UserError) as error:
        recipe_of(*changes)
    assert named in error.value.what


@pytest.fixture
def growing(tiny_data: tuple[Path, Path]) -> Recipe:
    return load(tiny((tiny_data[0], None), train={"epochs": 4}), [GROWING, "evaluate.linear_epochs=0"])


def test_views_have_the_epochs_side_and_what_they_show_is_drawn_alike(growing: Recipe):
    device, manifest = torch.device("cpu"), build.data.manifest_of(growing.data.path)
    labels = build.data.labels_of(growing.data.path)
    loader = build.data.loader(
        growing, growing.data.path, build.data.sets(growing, labels, labels).train, device=device
    )
    batch = next(iter(loader.epoch(0)))
    of_epoch, full = (
        build.views.augment_of_epoch(growing, manifest, device=device),
        build.views.augment(growing, manifest, device=device),
    )

    def views(augment: Augment, epoch: int) -> torch.Tensor:
        return augment(batch, epoch)[0]

    assert [tuple(views(of_epoch(e), e).shape) for e in range(4)] == [(2, 32, 3, s, s) for s in (8, 8, 12, 16)]
    assert torch.equal(views(of_epoch(3), 3), views(full, 3))
    small, large = views(of_epoch(0), 0), views(full, 0)
    shrunk = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).flatten()
    correlation = torch.corrcoef(torch.stack([small.flatten(), shrunk]))[0, 1]
    assert correlation > 0.95  # the same crops, flips and colors
    assert (
        build.views.clean_view(growing, manifest, device=device).views[0].side_px == 16
    )  # evaluation sees images as ever
    assert build.model.sides_px(growing) == [16, 12, 8]


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_a_resume_across_a_change_of_side_repeats_every_bit(growing: Recipe, tmp_path: Path):
    heard: list[dict[str, Any]] = []
    fastssl.train(growing, run_dir=tmp_path / "whole", observe=heard.append)
    steps = [one for one in records(tmp_path / "whole") if one["event"] == "step"]
    assert [one["side_px"] for one in steps] == [8] * 10 + [12] * 5 + [16] * 5
    assert (steps[-1]["images"], steps[-1]["views"]) == (20 * 32, 2 * 20 * 32)  # as many as at any side
    printed = [one["message"] for one in heard if one["event"] == "note"]
    assert printed == [f"Views of up to {side} px from epoch {epoch} on." for side, epoch in ((8, 0), (12, 2), (16, 3))]

    class Pulled(Exception):  # noqa: N818
        pass

    def pull_at(step: int) -> Any:
        def pull(record: dict[str, Any]) -> None:
            if record["event"] == "step" and record["step"] == step:
                raise Pulled

        return pull

    for stop in (8, 11):  # resumed from checkpoints at 5 and at 10: before a change, and just at it
        with pytest.raises(Pulled):
            fastssl.train(growing, run_dir=tmp_path / "parts", resume=True, observe=pull_at(stop))
    fastssl.train(growing, run_dir=tmp_path / "parts", resume=True)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    ours, theirs = (checkpoint.load_weights(tmp_path / name) for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_dry_run_says_where_views_start(growing: Recipe, tmp_path: Path):
    (tmp_path / "growing.json").write_text(growing.model_dump_json())
    done = CliRunner().invoke(app, ["train", str(tmp_path / "growing.json"), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["largest_sides_px"] == [8, 12, 16]
