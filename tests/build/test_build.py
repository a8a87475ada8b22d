"""From a recipe to its parts: which images, which loader, and what is refused before training."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import build
from fastssl.bench import dry_run
from fastssl.build import ranks
from fastssl.data.convert.convert import convert
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.training.loop import train

CPU = torch.device("cpu")


def folder_of(path: Path, **counts: int) -> Path:
    """Class folders with so many images of 8 px."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path / name / f"{i}.png")
    return path


def recipe_of(train: Path, test: Path):
    data = {"path": str(train), "test_path": str(test), "batch_size": 4, "val_count": 2}
    return load({"data": data, "train": {"epochs": 1}, "augment": {"side_px": 8}})


def sets_of(recipe):
    labels_N = build.data.labels_of(recipe.data.path)
    return build.data.sets(recipe, labels_N, labels_N)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"bird": 3, "dog": 3}, "class dog with label 1, and .*train.beton has cat there"),
        ({"bird": 3, "cat": 3, "dog": 3, "emu": 2}, "class emu with label 3, and .*none of that label"),
    ],
)
def test_a_test_set_of_other_classes_is_refused_before_training(tmp_path, counts, said):
    train, test = tmp_path / "train.beton", tmp_path / "test.beton"
    convert(folder_of(tmp_path / "a", bird=4, cat=4, dog=4), train)
    convert(folder_of(tmp_path / "b", **counts), test)
    with pytest.raises(UserError, match=said) as raised:
        sets_of(recipe_of(train, test))
    assert "classes=" in raised.value.fix
    assert "train.beton.json" in raised.value.fix


def test_a_test_set_without_labels_or_of_other_channels_is_refused_before_training(tmp_path):
    train, test, gray = (tmp_path / f"{name}.beton" for name in ("train", "test", "gray"))
    convert(folder_of(tmp_path / "a", bird=4, cat=4), train)
    convert(folder_of(tmp_path / "b", bird=2), test)
    convert(folder_of(tmp_path / "c", bird=2, cat=2), gray, channels=1)
    with pytest.raises(UserError, match=r"No image of .*test\.beton has a label"):
        sets_of(recipe_of(train, test))
    for field in ("test_path", "probe_path"):
        recipe = load(recipe_of(train, train), [f"data.{field}={gray}"])
        with pytest.raises(UserError, match=r"gray\.beton has images of 1 channels, .*train\.beton of 3") as raised:
            sets_of(recipe)
        assert "channels=3" in raised.value.fix


def test_images_are_held_out_of_pretraining_only_where_probes_have_no_file_of_their_own(tmp_path):
    data = {"source": "shapes", "path": str(tmp_path / "a.beton"), "count": 100, "val_count": 40, "batch_size": 80}
    recipe = load({"data": data, "device": "cpu", "train": {"epochs": 1}})
    with pytest.raises(UserError, match="larger than the 60 images"):
        build.preflight.check(recipe)
    probed = load(recipe, [f"data.probe_path={tmp_path / 'b.beton'}"])
    build.preflight.check(probed)
    assert dry_run.images_of(probed) == 100
    convert("shapes", tmp_path / "a.beton", side_px=8, count=100)
    convert("shapes", tmp_path / "b.beton", side_px=8, count=100)
    assert dry_run.images_of(probed) == 100  # as now counted in the files


def test_a_test_set_with_fewer_classes_agrees_once_the_classes_are_given(tmp_path):
    train, test = tmp_path / "train.beton", tmp_path / "test.beton"
    classes = convert(folder_of(tmp_path / "a", bird=4, cat=4, dog=4), train).classes
    convert(folder_of(tmp_path / "b", bird=3, dog=3), test, classes=classes)
    assert build.data.labels_of(test).unique().tolist() == [0, 2]
    assert len(sets_of(recipe_of(train, test)).val) == 2


def test_an_unlabeled_set_is_no_reason_to_refuse_a_test_set(tmp_path):
    train, test = tmp_path / "train.beton", tmp_path / "test.beton"
    convert("shapes", train, split="unlabeled", count=8, side_px=8)
    convert(folder_of(tmp_path / "b", bird=3, dog=3), test)
    assert len(sets_of(recipe_of(train, test)).probe) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_evaluate_contiguous_parts_without_padding(tiny_recipe, monkeypatch, shared):
    recipe = load(tiny_recipe)
    path, chosen, world = recipe.data.path, torch.arange(0, 200, 3), 5
    share = build.data.loader(recipe, path, torch.arange(200), device=CPU) if shared else None
    parts = []
    for rank in range(world):
        loader = build.data.ordered_loader(recipe, path, chosen, device=CPU, share=share, rank=rank, world=world)
        parts.append([i for batch in loader.epoch(0) for i in batch.index_B.tolist()])
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            patch.setattr(ranks, "world", lambda: world)
            assert parts[-1] == chosen[list(ranks.shard(len(chosen)))].tolist()
    assert [i for part in parts for i in part] == chosen.tolist()


def test_a_recipe_looks_for_its_test_split_before_it_converts_and_may_skip_bad_files(tmp_path):
    source = folder_of(tmp_path / "in", bird=2, cat=2)
    (source / "bird" / "bad.png").write_bytes(b"nothing")
    data = {"path": str(tmp_path / "train.beton"), "source": str(source), "on_error": "skip"}
    recipe = {"name": "x", "data": data | {"test_path": str(tmp_path / "test.beton")}, "train": {"epochs": 1}}
    with pytest.raises(UserError, match="no images for split 'test'"):
        build.data.ensure_data(load(recipe))
    assert not (tmp_path / "train.beton").exists()
    build.data.ensure_data(load(recipe | {"data": data}))
    assert build.data.manifest_of(tmp_path / "train.beton").skipped_count == 1


def test_a_file_made_from_another_source_or_in_another_way_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "a", bird=2, cat=2)
    folder_of(tmp_path / "b", bird=2, cat=2)
    data = {"path": "train.beton", "source": "a", "side_px": 8}

    def said(**changes):
        recipe = load({"name": "x", "data": data | changes, "train": {"epochs": 1}})
        build.data.ensure_data(recipe)
        return build.run_data.made_otherwise(recipe)

    assert not said()
    assert not said(source=str(tmp_path / "a"))
    assert not said(source=None, side_px=16)
    (sentence,) = said(source="b", side_px=16)
    assert "made with source a, side_px 8, and the recipe says source b, side_px 16" in sentence


GROUPS = "model.batch_norm=per_view", "model.batch_norm_groups=8"


@pytest.mark.parametrize(
    ("world", "settings", "fix"),
    [
        (2, ["data.batch_size=33"], "Set data.batch_size to 32 or 34."),
        (2, ["data.batch_size=12", "optim.accumulate_steps=4"], "Set data.batch_size to 8 or 16."),
        (4, ["data.batch_size=16", *GROUPS], "Set data.batch_size to 32 or 36."),
    ],
)
def test_a_batch_divides_over_ranks_parts_and_groups(tiny_recipe, tmp_path, monkeypatch, world, settings, fix):
    recipe = load(tiny_recipe, settings)
    build.checks.check_parts(recipe)  # of a process alone nothing is wrong
    monkeypatch.setattr(ranks, "world", lambda: world)
    with pytest.raises(UserError, match=f"{recipe.data.batch_size} does not divide over {world} ranks") as raised:
        train(recipe, run_dir=tmp_path / "run")
    assert raised.value.fix == fix
    build.checks.check_parts(load(recipe, [f"data.batch_size={fix.split()[3]}"]))


def test_a_last_batch_divides_over_groups_too(tiny_recipe):
    settings = ["data.batch_size=18", "data.val_count=0", "data.drop_last=false"]
    recipe = load(tiny_recipe, [*settings, "model.batch_norm=per_view", "model.batch_norm_groups=2"])
    with pytest.raises(UserError, match=r"last batch of 2 of 200 images does not divide into 1 parts .* of 4 or more"):
        sets_of(recipe)
    build.checks.check_batch(recipe, 202)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["model.backbone=torchvision/vit_b_16", "model.stem=auto", "model.width=1", "augment.side_px=24"],
            "model.backbone torchvision/vit_b_16 cannot be built for 3 x 24 x 24 images: Input shape indivisible",
        ),
        (
            ["model.backbone=timm/resnet18.typo", "model.stem=auto", "model.width=1"],
            "model.backbone timm/resnet18.typo cannot be built .*Invalid pretrained tag",
        ),
        (["model.projector=[1000000000000000]"], r"model\.projector \[1000000000000000\] cannot be built"),
        (["model.freeze=['']", "model.projector=[]"], "Nothing is left to train"),
    ],
)
def test_a_network_that_cannot_be_built_is_explained_before_anything_is_converted(
    tiny_recipe, tmp_path, settings, said
):
    if "timm" in said:
        pytest.importorskip("timm")
    absent = [f"data.path={tmp_path / 'a.beton'}", "data.source=shapes", "data.count=200"]
    for recipe in (load(tiny_recipe, settings), load(tiny_recipe, [*settings, *absent])):
        for verb in (partial(train, run_dir=tmp_path / "run"), dry_run.describe):
            with pytest.raises(UserError, match=said) as raised:
                verb(recipe)
            assert "\n" not in raised.value.what
    assert not list(tmp_path.iterdir())
