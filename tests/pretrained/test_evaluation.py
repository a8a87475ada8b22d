"""`fastssl eval`: the probes' own figures on the network's features, choices off the test set, clear errors."""

import contextlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import two_lines
from tiny import tiny

import fastssl
from fastssl import build
from fastssl.data.convert.convert import convert
from fastssl.errors import UserError
from fastssl.pretrained.evaluation import features
from fastssl.pretrained.evaluation.evaluate import evaluate as judge
from fastssl.pretrained.evaluation.finetune import finetune
from fastssl.pretrained.evaluation.splits import splits
from fastssl.pretrained.export.export import export
from fastssl.pretrained.load import digest_of, run_folder
from fastssl.probes import evaluate
from fastssl.recipe.load import dump, load
from fastssl.runs import checkpoint

Data = tuple[Path, Path]
QUICK: dict[str, Any] = {"linear_epochs": 3, "finetune_epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Data) -> Path:
    recipe = tiny(
        tiny_data, model={"projector": [16, 8]}, train={"epochs": 1}, evaluate={"linear_epochs": 0, "knn_k": [20]}
    )
    folder = tmp_path_factory.mktemp("trained") / "run"
    fastssl.train(recipe, run_dir=folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("features"))
    return tmp_path / "run"


def by_name(record: dict[str, Any]) -> dict[tuple[str, int, str, float], float]:
    return {(r["probe"], r["views"], r["layer"], r["label_share_pct"]): r["pct"] for r in record["rows"]}


def test_figures_are_the_probes_own_on_the_loaded_features(run: Path, tiny_data: Data) -> None:
    from fastssl.data.beton.reader import Beton

    record = judge(run, on="test", **QUICK)
    net = fastssl.load(run, device="cpu")
    x, y, x_test, y_test = (
        torch.from_numpy(part)
        for path in tiny_data
        for part in (
            net.embed(np.stack([Beton(path).image(i) for i in range(len(Beton(path)))])),
            Beton(path).labels.astype(np.int64),
        )
    )
    found = by_name(record)
    for name, pct in evaluate.knn(x, y, x_test, y_test, ks=(20,)).items():
        assert found[name.removesuffix("_pct"), 1, "backbone", 100.0] == pytest.approx(pct, abs=1.01)
    assert found["ridge", 1, "backbone", 100.0] == pytest.approx(
        evaluate.ridge(x, y, x_test, y_test)["ridge_pct"], abs=1.01
    )
    assert record["judged"]["images"] == 100
    for row in record["rows"]:
        assert row["low_pct"] <= row["pct"] <= row["high_pct"]
        assert row["low_pct"] < row["high_pct"]


def test_the_end_of_a_run_and_eval_on_test_agree(trained: Path, run: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    found = by_name(judge(run, on="test", probes=["knn", "ridge"], **QUICK))
    assert found["knn20", 1, "backbone", 100.0] == summary["test_knn20_pct"]
    assert found["ridge", 1, "backbone", 100.0] == summary["test_ridge_pct"]


def test_the_default_is_the_runs_own_validation_split(run: Path, tiny_data: Data) -> None:
    record = judge(run, probes=["knn"], **QUICK)
    assert (record["on"], record["train"]["images"], record["judged"]["images"]) == ("val", 160, 40)
    net = fastssl.load(run, device="cpu")
    labels = build.data.labels_of(tiny_data[0])
    learn, held = splits(net, data=None, test=None, on="val", folder=None)
    sets = build.data.sets(net.recipe, labels, labels)
    assert torch.equal(learn.rows_N, sets.probe)
    assert torch.equal(held.rows_N, sets.val)
    assert torch.equal(held.labels_N, labels[sets.val])


def test_every_combination_has_its_row_and_is_remembered(run: Path) -> None:
    options = QUICK | {"views": [1, 3], "layers": ["backbone", "projector"], "few_label_pct": [10.0]}
    record = judge(run, probes=["knn", "ridge", "linear", "finetune"], **options)
    labels = splits(fastssl.load(run, device="cpu"), data=None, test=None, on="val", folder=None)[0].labels_N
    found = by_name(record)
    assert set(found) == {
        (probe, views, layer, share)
        for probe in ("knn20", "ridge", "linear")
        for views in (1, 3)
        for layer in ("backbone", "projector")
        for share in (100.0, 10.0)
    } | {("finetune", 1, "whole network", share) for share in (100.0, 10.0)}
    assert {r["train_images"] for r in record["rows"]} == {160, len(evaluate.few_labels(labels, 0.1))}
    assert record["spectrum"]["projector"]["dims"] == 8
    assert [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] == [record]
    assert json.loads(json.dumps(record)) == record


def test_figures_are_of_the_clean_view_whatever_views_are_judged(run: Path) -> None:
    options: dict[str, Any] = {"probes": ["knn"], **QUICK}
    assert judge(run, views=[3], **options)["spectrum"] == judge(run, views=[1], **options)["spectrum"]


def test_what_is_given_twice_is_computed_once(run: Path) -> None:
    once, twice = (judge(run, probes=["knn"] * n, views=[2] * n, layers=["backbone"] * n, **QUICK) for n in (1, 2))
    assert twice["rows"] == once["rows"]


def test_rows_tell_the_passes_that_were_made(run: Path) -> None:
    record = judge(run, probes=["linear", "finetune"], few_label_pct=[10.0], **QUICK | {"finetune_lr": 0.01})
    found = {(row["probe"], row["label_share_pct"]): row for row in record["rows"]}
    assert found["linear", 100.0]["linear_epochs"] == QUICK["linear_epochs"]
    few = found["finetune", 10.0]
    assert few["train_images"] < 128  # one step an epoch
    assert few["finetune_epochs"] == 100
    warnings = judge(run, probes=["knn"], finetune_lr=0.01)["warnings"]
    assert any("finetune_lr changes nothing" in text for text in warnings)


def test_each_share_of_the_labels_has_its_own_remarks(run: Path) -> None:
    warnings = judge(run, probes=["knn", "ridge", "linear"], few_label_pct=[1], **QUICK)["warnings"]
    assert [text for text in warnings if text.startswith("kNN uses k = ")]
    few = [text.removeprefix("With 1 % of the labels: ") for text in warnings if text.startswith("With 1 %")]
    assert len(few) == 3, warnings
    assert few[0].startswith("kNN uses k = 1 in place of 20")


def test_what_figures_without_labels_have_no_use_for_is_refused(run: Path) -> None:
    idle: dict[str, Any] = {"data": "absent.beton", "probes": ["knn"], "views": [16], "few_label_pct": [1]}
    with pytest.raises(UserError, match="data and probes and views and few_label_pct: the figures"):
        judge(run, on="pretraining", **QUICK | idle)
    judge(run, on="pretraining", **QUICK)


def test_a_mean_over_views_is_of_the_clean_and_augmented_ones(run: Path) -> None:
    net = fastssl.load(run, device="cpu")
    part, _ = splits(net, data=None, test=None, on="val", folder=None)
    keys = [(1, "backbone"), (2, "backbone"), (4, "backbone")]
    found = features.extract(net, part, keys, None)
    alone = features.extract(net, part, keys[2:], None)
    assert torch.equal(found[4, "backbone"], alone[4, "backbone"])
    second = 2 * found[2, "backbone"] - found[1, "backbone"]
    assert not torch.allclose(second, found[1, "backbone"], rtol=0.01)
    rest = 4 * found[4, "backbone"] - 2 * found[2, "backbone"]
    assert not torch.allclose(rest / 2, second, rtol=0.01)  # the augmented views differ among themselves


def test_features_are_extracted_once_and_damage_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judge(run, probes=["knn"], **QUICK)
    files = sorted((run / "features").glob("*.safetensors"))
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", lambda *a: pytest.fail("extracted again"))
        assert judge(run, probes=["knn"], **QUICK)["rows"] == first["rows"]
    for damage in (b"", b"nonsense", files[0].read_bytes()[:-9] + b"\x01" * 9):
        files[0].write_bytes(damage)
        assert judge(run, probes=["knn"], **QUICK)["rows"] == first["rows"]
    assert json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])["rows"] == first["rows"]


def test_other_weights_do_not_share_features(run: Path) -> None:
    judge(run, probes=["knn"], **QUICK)
    weights = checkpoint.load_weights(run)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, run / "other.safetensors")
    judge(run / "other.safetensors", probes=["knn"], **QUICK)
    assert len(list((run / "features").glob("*.safetensors"))) == 4


def test_loose_weights_need_a_recipe_and_the_backbone_alone_will_do(run: Path, tmp_path: Path) -> None:
    weights = checkpoint.load_weights(run)
    bare = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    loose, recipe = tmp_path / "loose.safetensors", tmp_path / "the_recipe.yaml"
    save_file(bare | {"fc.weight": torch.zeros(10, 32)}, loose)
    recipe.write_text(dump(load(run / "recipe.yaml")))
    with pytest.raises(UserError, match="not a run"):
        judge(loose, **QUICK)
    alone = judge(loose, recipe=recipe, probes=["knn"], **QUICK)
    assert alone["rows"] == judge(run, probes=["knn"], **QUICK)["rows"]
    with pytest.raises(UserError, match="backbone alone"):
        judge(loose, recipe=recipe, layers=["projector"], **QUICK)


def test_transfer_to_another_set_of_another_size(run: Path, tmp_path: Path) -> None:
    train, test = tmp_path / "a.beton", tmp_path / "b.beton"
    convert("shapes", train, split="train", side_px=24, count=120)
    convert("shapes", test, split="test", side_px=24, count=60)
    record = judge(run, data=train, test=test, probes=["knn"], **QUICK)
    assert (record["on"], record["train"]["images"], record["judged"]["images"]) == ("test", 120, 60)
    assert record["side_px"] == 16  # the network's own
    held = judge(run, data=train, probes=["knn"], **QUICK)
    assert (held["on"], held["train"]["images"] + held["judged"]["images"]) == ("val", 120)


def test_images_of_another_side_are_judged_as_by_a_run_that_has_it(run: Path, tmp_path: Path) -> None:
    own = judge(run, probes=["knn"], **QUICK)
    other = judge(run, probes=["knn"], side_px=24, **QUICK)
    assert (own["side_px"], other["side_px"]) == (16, 24)
    assert other["spectrum"] != own["spectrum"]
    twin = shutil.copytree(run, tmp_path / "twin")
    shutil.rmtree(twin / "features")
    (twin / "recipe.yaml").write_text(dump(load(run / "recipe.yaml", ["evaluate.side_px=24"])))
    twin_own = judge(twin, probes=["knn"], **QUICK)
    assert (twin_own["rows"], twin_own["spectrum"]) == (other["rows"], other["spectrum"])
    printed = command.fastssl("eval", str(run), "--probe", "knn", "--side-px", "24")
    assert " at 24 px, checkpoint of step " in printed.stdout


@pytest.mark.parametrize("side_px", [3, 1025, 24.5, "24"])
def test_a_side_that_is_none_is_named(run: Path, side_px: object) -> None:
    with pytest.raises(UserError, match=r"side_px=.*\nSet side_px to 4 to 1024"):
        judge(run, side_px=side_px, **QUICK)


def test_at_the_command_line_a_side_that_is_none_is_named_by_its_flag(run: Path) -> None:
    two_lines(command.fastssl("eval", str(run), "--side-px", "3"), "Set --side-px to 4 to 1024")


def test_a_known_set_is_fetched_only_where_that_is_allowed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"cifar10 is not in .*\n.*download=True.* cifar-10-python\.tar\.gz"):
        judge(run, data="cifar10", on="test", **QUICK)
    with pytest.raises(UserError, match="cifar10 cannot be downloaded"):
        judge(run, data="cifar10", on="test", download=True, **QUICK)
    two_lines(command.fastssl("eval", str(run), "--data", "cifar10", "--no-download"), "cifar-10-python.tar.gz")


def test_a_folder_of_images_is_converted_into_the_run(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    record = judge(run, data=tmp_path / "pets", on="test", probes=["knn"], **QUICK)
    assert (record["train"]["images"], record["judged"]["images"]) == (12, 6)


def photo_splits(folder: Path, *names: str) -> Path:
    """Two transparent and two plain photos of each class and split, and a file that is none."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in names:
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 200, (16, 16, 4 if i < 2 else 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
        (folder / split / "notes.txt").write_text("no image")
    return folder


def test_a_source_without_a_test_split_is_judged_on_val_and_says_so(run: Path, tmp_path: Path) -> None:
    pets = photo_splits(tmp_path / "pets", "train", "val")
    record = judge(run, data=pets, on="test", probes=["knn"], **QUICK)
    assert (record["judged"]["split"], record["judged"]["images"]) == ("val", 8)
    assert record["warnings"][0] == f"{pets} has no test split; its val split was judged instead."
    assert (
        judge(run, data=photo_splits(tmp_path / "all", "train", "val", "test"), on="test", probes=["knn"], **QUICK)[
            "judged"
        ]["split"]
        == "test"
    )
    with pytest.raises(UserError, match="split 'test'"):
        judge(run, data=photo_splits(tmp_path / "one", "train"), on="test", probes=["knn"], **QUICK)


def test_a_test_source_without_splits_is_the_test_set(run: Path, tmp_path: Path) -> None:
    photo_splits(tmp_path, "pets_train", "pets_test")
    train, test = tmp_path / "pets_train", tmp_path / "pets_test"
    record = judge(run, data=train, test=test, probes=["knn"], **QUICK)
    assert (record["on"], record["train"]["images"], record["judged"]["images"]) == ("test", 8, 8)
    with pytest.raises(UserError, match="split 'test'"):
        judge(run, data=train, test=train, probes=["knn"], **QUICK)


def test_a_test_source_may_have_the_name_of_the_other(run: Path, tmp_path: Path) -> None:
    train, test = (photo_splits(tmp_path / name, "pets") / "pets" for name in ("first", "second"))
    (train / "cat" / "3.png").unlink()
    record = judge(run, data=train, test=test, probes=["knn"], **QUICK)
    assert (record["train"]["images"], record["judged"]["images"], record["judged"]["source"]) == (7, 8, str(test))


def test_a_source_with_an_unreadable_image_is_refused_or_judged_without_it(run: Path, tmp_path: Path) -> None:
    pets = photo_splits(tmp_path / "pets", "train", "test")
    (pets / "test" / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"9\.png"):
        judge(run, data=pets, on="test", probes=["knn"], **QUICK)
    judged = judge(run, data=pets, on="test", probes=["knn"], on_error="skip", **QUICK)["judged"]
    assert (judged["images"], judged["skipped"]) == (8, 1)


def test_an_evaluation_ends_with_the_account_of_its_sources(run: Path, tmp_path: Path) -> None:
    pets = photo_splits(tmp_path / "pets", "train", "test")
    done = command.fastssl("eval", str(run), "--data", str(pets), "--on", "test", "--probe", "knn", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for split in ("train", "test"):
        at = lines.index(f"{pets}, split {split}: 8 labeled images used.")
        assert lines[at + 1] == "Splits: test 8, train 8."
        assert lines[at + 2] == "Passed over: 2 x .txt file."
        assert "transparent" in lines[at + 3]
        assert "(4 images, first " in lines[at + 3]


def test_the_head_of_fine_tuning_has_as_many_outputs_as_there_are_classes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of 7 and 10^9 give the accuracy that 0 and 1 give."""
    from fastssl.data.convert.labels import relabel
    from fastssl.pretrained.evaluation import finetune as module
    from fastssl.pretrained.evaluation.splits import labeled_part

    net, results, outputs = fastssl.load(run, device="cpu"), [], []
    whole = module.classifier
    monkeypatch.setattr(module, "classifier", lambda net, classes: outputs.append(classes) or whole(net, classes))
    path = tmp_path / "two.beton"
    convert(photo_splits(tmp_path / "pets", "train"), path)
    for labels in ([0] * 4 + [1] * 4, [7] * 4 + [10**9] * 4):
        relabel(path, np.array(labels))
        part = labeled_part(path)
        assert part.labels_N.tolist() == labels
        results.append(finetune(net, part, part, epochs=1, lr=3e-3)[0])
    assert outputs == [2, 2]
    assert results[0] == results[1] > 50


def test_fine_tuning_learns_and_leaves_the_network_alone(run: Path) -> None:
    net = fastssl.load(run, device="cpu")
    learn, held = splits(net, data=None, test=None, on="val", folder=None)
    before = digest_of(net.backbone.state_dict())
    fitted, _ = finetune(net, learn, learn, epochs=15, lr=3e-3)
    chance = 100 / len(set(learn.labels_N.tolist()))
    assert fitted > 2 * chance
    assert digest_of(net.backbone.state_dict()) == before
    assert finetune(net, learn, held, epochs=1, lr=3e-3) == finetune(net, learn, held, epochs=1, lr=3e-3)


def colors(path: Path, *names: str) -> Path:
    """Four photos of each color, converted on their own."""
    from PIL import Image

    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), name).save(path / name / f"{i}.png")
    convert(str(path), path.with_suffix(".beton"))
    return path.with_suffix(".beton")


def test_labels_of_files_that_were_numbered_on_their_own_are_matched_by_name(run: Path, tmp_path: Path) -> None:
    data, test = colors(tmp_path / "a", "blue", "green", "red"), colors(tmp_path / "b", "green", "red")
    net = fastssl.load(run, device="cpu")
    learn, tested = splits(net, data=data, test=test, on="test", folder=None)
    assert learn.labels_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert tested.labels_N.tolist() == [1] * 4 + [2] * 4
    with pytest.raises(UserError, match="classes that train lacks: blue"):
        splits(net, data=test, test=data, on="test", folder=None)


def test_names_that_are_numbers_are_matched_as_names_and_never_with_words(run: Path, tmp_path: Path) -> None:
    data, test = colors(tmp_path / "a", "blue", "green", "red"), colors(tmp_path / "b", "green", "red", "white")
    net, names = fastssl.load(run, device="cpu"), json.loads(data.with_name("a.beton.json").read_text())

    def tested(learned: list[str], own: list[str]) -> list[int]:
        for path, classes in ((data, learned), (test, own)):
            path.with_name(path.name + ".json").write_text(json.dumps(names | {"classes": classes}))
        part = splits(net, data=data, test=test, on="test", folder=None)[1]
        return [int(label) for label in part.labels_N[::4]]

    assert tested(["1", "10", "2"], ["1", "2", "10"]) == [0, 2, 1]
    assert tested(["1", "10", "2"], ["a", "b", "c"]) == [0, 1, 2]


def unlabeled(folder: Path) -> Path:
    from PIL import Image

    (folder / "flat").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "flat" / "a.png")
    convert(str(folder / "flat"), folder / "flat.beton")
    return folder / "flat.beton"


def gray(folder: Path, tiny: Path) -> Path:
    convert(str(tiny), folder / "gray.beton", channels=1)
    return folder / "gray.beton"


def two_classes(folder: Path) -> Path:
    from PIL import Image

    for name in ("a", "b"):
        (folder / "two" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), "red").save(folder / "two" / name / f"{i}.png")
    convert(str(folder / "two"), folder / "two.beton")
    return folder / "two.beton"


def one_of_each(folder: Path) -> Path:
    from PIL import Image

    for name in ("circle", "square", "ring"):
        (folder / "one" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(folder / "one" / name / "0.png")
    return folder / "one"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (lambda d, t: {"data": unlabeled(d)}, "None of the 1 images"),
        (lambda d, t: {"data": gray(d, t[0])}, "1 channels, the network takes 3"),
        (lambda d, t: {"data": two_classes(d), "test": t[1]}, "classes that train lacks"),
        (lambda d, t: {"data": one_of_each(d)}, "No labeled image of .* can be held out"),
        (lambda d, t: {"data": d / "absent.beton"}, "does not exist"),
        (lambda d, t: {"data": "absent-folder"}, "does not exist"),
        (lambda d, t: {"data": t[0], "on": "test"}, "no test set"),
        (lambda d, t: {"test": t[1], "on": "val"}, "the evaluation is on val"),
        (lambda d, t: {"data": t[0], "test": d / "absent.beton", "on": "val"}, "the evaluation is on val"),
        (lambda d, t: {"probes": ["svm"]}, "probes svm"),
        (lambda d, t: {"views": [0]}, "views 0"),
        (lambda d, t: {"layers": ["stem"]}, "layers stem"),
        (lambda d, t: {"few_label_pct": [150]}, "few_label_pct 150"),
        (lambda d, t: {"finetune_lr": -1.0}, r"finetune_lr=-1\.0"),
        (lambda d, t: {"finetune_lr": math.nan}, "finetune_lr=nan"),
        (lambda d, t: {"linear_epochs": 0}, "linear_epochs=0"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(
    run: Path, tmp_path: Path, tiny_data: Data, options: Any, what: str
) -> None:
    with pytest.raises(UserError, match=what) as error:
        judge(run, **QUICK | options(tmp_path, tiny_data))
    assert error.value.fix
    assert not (run / "evaluations.jsonl").exists()


def test_a_spoilt_run_is_explained(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no whole checkpoint"):
        judge(run, **QUICK)
    (run / "w.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="not a safetensors file"):
        judge(run / "w.safetensors", **QUICK)
    save_file({"backbone.conv1.weight": torch.zeros(3)}, run / "w.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        judge(run / "w.safetensors", **QUICK)


EDITS = {
    "a wide network": ("recipe.yaml", "width: 0.25", "width: 8"),
    "a huge projector": ("recipe.yaml", "- 16", "- 1000000000000"),
    "an unknown backbone": ("recipe.yaml", "resnet_tiny", "resnet_huge"),
    "many channels": ("data.json", '"channels": 3', '"channels": 1000000000000'),
    "a channel less": ("data.json", '"channels": 3', '"channels": 2'),
    "a mean in words": ("data.json", '"mean": [', '"mean": ["a",'),
    "data elsewhere": ("recipe.yaml", "train.beton", "moved.beton"),
    "all held out": ("recipe.yaml", "val_count: 40", "val_count: 4000"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_run_is_explained(run: Path, edit: str) -> None:
    name, old, new = EDITS[edit]
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        judge(run, probes=["knn"], **QUICK)
    assert error.value.fix


def test_random_damage_to_a_run_gives_figures_or_an_explanation(run: Path) -> None:
    rng = random.Random(0)
    files = [run / "recipe.yaml", run / "data.json", *sorted((run / "checkpoints").rglob("*.*"))]
    whole = {path: path.read_bytes() for path in files}
    explained = 0
    for _ in range(60):
        path = rng.choice(files)
        data = bytearray(whole[path])
        for _ in range(rng.choice((1, 8))):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(1, 40)]
                case _:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # anything else, a crash above all, fails the test
            judge(run, probes=["knn"], **QUICK)
            explained -= 1
        with contextlib.suppress(UserError):
            export(run, run.parent / "out.safetensors", to="safetensors")
        explained += 1
        path.write_bytes(whole[path])
    assert explained > 20


def test_the_command_prints_a_table_and_one_record(run: Path) -> None:
    words = ["eval", str(run), "--probe", "knn,ridge", "--device", "cpu"]
    done = command.fastssl(*words, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [r["probe"] for r in record["rows"]] == ["knn20", "ridge"]
    done = command.fastssl(*words)
    assert "95 % interval" in done.stdout
    assert f"{record['rows'][0]['pct']:.2f}" in done.stdout
    two_lines(command.fastssl("eval", "absent"), "absent is not a run")
    two_lines(command.fastssl("eval", str(run), "--views", "many"), "--views")


def test_a_recipe_next_to_weights_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x")
    assert run_folder(tmp_path / "weights.safetensors") is None
    (tmp_path / "environment.json").write_text("{}")
    assert run_folder(tmp_path / "weights.safetensors") == tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"probes": "knn"}, "probes is 'knn', not a list"),
        ({"views": 16}, "views is 16, not a list"),
        ({"few_label_pct": 10}, "few_label_pct is 10, not a list"),
        ({"layers": "backbone"}, "layers is 'backbone', not a list"),
        ({"linear_epochs": -1}, "linear_epochs=-1"),
        ({"finetune_lr": 0.0}, r"finetune_lr=0\.0"),
    ],
)
def test_arguments_that_are_none_are_named(tiny_run: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        judge(tiny_run, **arguments)
