"""The prober: features in order, one copy of the file, and on 2 gloo ranks the figures of a single process."""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

import fastssl
from fastssl import build
from fastssl.build import ranks
from fastssl.data.convert.convert import convert
from fastssl.models import pretrainer
from fastssl.pretrained.evaluation.evaluate import evaluate
from fastssl.probes import spectrum, table
from fastssl.recipe.load import load, shipped
from fastssl.training.online_probes import Part, Prober, views_of

Data = tuple[Path, Path]


def prober(recipe: dict[str, Any]) -> tuple[Prober, pretrainer.Pretrainer]:
    resolved = load(recipe)
    device = build.hardware.device(resolved)
    path = resolved.data.path
    labels = build.data.labels_of(path)
    manifest = build.data.manifest_of(path)
    sets = build.data.sets(resolved, labels, labels)
    clean = build.views.clean_view(resolved, manifest, device=device)
    network = build.model.network(resolved, in_channels=3, device=device)
    return Prober(resolved, path, sets, clean=clean, device=device), network


def figures(recipe: dict[str, Any]) -> dict[str, float]:
    made, network = prober(recipe)
    return made.while_training(network.backbone) | made.at_the_end(network.backbone, Path(recipe["data"]["test_path"]))


def test_features_are_every_images_in_the_files_order(tiny_recipe: dict[str, Any]) -> None:
    made, network = prober(tiny_recipe | {"evaluate": {"batch_size": 7}})
    assert made.all_labeled is not None
    rows, labels = made.all_labeled.features(made.embed_with(network.backbone))
    assert torch.equal(labels, build.data.labels_of(Path(tiny_recipe["data"]["path"])))
    (batch,) = build.data.ordered_loader(
        load(tiny_recipe), Path(tiny_recipe["data"]["path"]), None, device=rows.device
    ).epoch(0)
    whole = pretrainer.embed(network.backbone, views_of(made.clean, batch)[0][0], autocast=None)
    torch.testing.assert_close(rows, whole, rtol=1e-4, atol=1e-5)
    rows.add_(1)  # usable outside inference mode


def test_the_invariance_residual_is_of_the_recipes_own_views(tiny_recipe: dict[str, Any]) -> None:
    made, network = prober(tiny_recipe)
    found = made.while_training(network.backbone)
    names = {"dead_dims", "orthogonality_residual", "rankme", "participation_ratio", "alpha", "alpha_r2"}
    assert names <= found.keys()
    assert made.varied is not None
    views_NVF, _ = made.varied.features(lambda batch: made.embed_views(network.backbone, batch))
    assert views_NVF.shape == (160, 2, 32)
    assert (found["spectrum_images"], found["val_images"]) == (160, 40)
    assert found["invariance_residual"] == spectrum.invariance_residual(views_NVF.movedim(1, 0))
    same, _ = prober(tiny_recipe | {"augment": {"preset": "none", "side_px": 16}})
    assert same.while_training(network.backbone)["invariance_residual"] < 1e-9 < found["invariance_residual"]


def test_without_labels_the_figures_are_measured_all_the_same(tiny_recipe: dict[str, Any]) -> None:
    unlabeled = tiny_recipe | {"data": tiny_recipe["data"] | {"val_count": 0}}
    made, network = prober(unlabeled)
    metrics = made.while_training(network.backbone)
    assert {probe.key for probe in table.FIGURES if probe.while_training} == metrics.keys()
    assert metrics["spectrum_images"] == 200


def test_a_k_above_the_images_of_a_class_is_capped_and_said(tiny_recipe: dict[str, Any]) -> None:
    made, network = prober(tiny_recipe | {"evaluate": {"knn_k": [5, 200]}})
    metrics = made.while_training(network.backbone)
    assert made.learn is not None
    _, labels_N = made.learn.features(made.embed_with(network.backbone))
    each = len(labels_N) // len(set(labels_N.tolist()))
    assert metrics["knn200_used"] == each < 200
    assert "knn5_used" not in metrics
    assert table.label_of("knn200_pct", metrics) == f"kNN (k = {each})"
    assert f"k = {each} in place of 200" in table.remarks(metrics)["knn200_used"]


def listed(folder: Path, labels: list[str]) -> Path:
    """A converted file of random images with these labels, where "" is none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(labels)):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:02}.png")
    rows = [f"{i:02}.png,{label}" for i, label in enumerate(labels)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    convert(folder / "list.csv", folder / "images.beton")
    return folder / "images.beton"


def test_images_that_cannot_be_judged_are_left_out_and_reported(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    train = listed(tmp_path / "train", ["ant"] * 37 + ["bee"])  # the only bee is one of the three that are held out
    test = listed(tmp_path / "test", ["ant", "", "ant", "ant", ""])
    data = {"path": str(train), "test_path": str(test), "val_count": 3, "batch_size": 16}
    recipe = tiny_recipe | {"data": tiny_recipe["data"] | data}
    made, _ = prober(recipe)
    assert made.not_measured == [
        "1 of 3 held-out images are of classes without an image to learn from, and are left out.",
        f"2 images of {test} have no label, and are left out.",
    ]
    found = figures(recipe)
    assert (found["val_images"], found["test_images"]) == (2, 3)
    found = fastssl.train(recipe, run_dir=tmp_path / "run")
    assert found["test_images"] == 3
    evaluated = evaluate(tmp_path / "run", probes=["knn"])
    assert evaluated["rows"][0]["images"] == 2
    assert made.not_measured[0] in evaluated["warnings"]
    assert made.not_measured[1] in evaluate(tmp_path / "run", on="test", probes=["knn"])["warnings"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["augment.rows=[{},{},{}]", "augment.views=4"], "augment.views 4 changes nothing"),
        (["augment.small_side_px=8"], "small_side_px changes nothing with the preset"),
        (["augment.all.rotate_p=0.5"], "rotate_p changes nothing without rotate_max_deg"),
        (["augment.all.rotate_max_deg=15"], "rotate_max_deg changes nothing without rotate_p"),
        (["augment.all.pad_px=4"], "pad_px changes nothing without crop: pad"),
        (["augment.all.crop=pad"], "crop: pad is a plain resize without pad_px"),
        (["augment={preset: none, side_px: 16, all: {jitter_p: 0.8}}"], "jitter_p changes nothing without one of"),
        (["optim.momentum=0.99"], "momentum changes nothing with the optimizer adamw: it is of sgd, lars, muon"),
        (["optim.name=sgd", "optim.betas=[0.8, 0.9]"], "betas changes nothing with the optimizer sgd"),
        (["optim.trust=0.1"], "trust changes nothing"),
        (["optim.schedule=constant", "optim.final_fraction=0.1"], "final_fraction changes nothing"),
        (["data.loader=ffcv", "data.memory=mmap"], "data.memory mmap changes nothing with data.loader ffcv"),
        (["train.gradient_compression=bf16"], "gradient_compression bf16 changes nothing in a single process"),
        (["evaluate.baselines=true", "data.test_path=null"], "baselines changes nothing"),
    ],
)
def test_a_setting_without_effect_is_reported(tiny_recipe: dict[str, Any], changes: list[str], said: str) -> None:
    assert not build.idle.idle_settings(load(tiny_recipe))
    (found,) = build.idle.idle_settings(load(tiny_recipe, changes))
    assert said in found


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_recipes_have_no_setting_without_effect(path: Path) -> None:
    compression = "train.gradient_compression"  # has an effect under torchrun
    assert not [said for said in build.idle.idle_settings(load(path)) if compression not in said]


def test_rows_without_a_number_of_views_are_no_mistake(tiny_recipe: dict[str, Any]) -> None:
    rows = load(tiny_recipe, ["augment.rows=[{},{},{}]"])
    assert not build.idle.idle_settings(rows)
    assert not build.idle.idle_settings(load(rows.model_dump(mode="json")))  # as a run's recipe.yaml, every field set


def test_a_test_set_of_the_images_learned_from_is_reported(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_recipe["data"]["path"]
    recipe = tiny_recipe | {"data": tiny_recipe["data"] | {"test_path": path}}
    assert [f"{path} has the images of {path}" in said for said in prober(recipe)[0].not_measured] == [True]


def worker(rank: int, world: int, port: int, folder: str, recipe: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks.start("cpu", timeout_s=120)
    found = figures(recipe)
    made, network = prober(recipe)
    few = Part(load(recipe), Path(recipe["data"]["path"]), torch.tensor([5]), device=torch.device("cpu"))
    rows, labels = few.features(made.embed_with(network.backbone))
    record = {"figures": found, "few": [len(rows), labels.tolist()], "mine": sum(map(len, made.val.epoch(0)))}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))
    ranks.barrier()
    ranks.stop()


def test_two_ranks_share_the_images_and_give_one_processs_figures(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe | {"data": tiny_recipe["data"] | {"val_count": 41}}  # does not divide over 2 ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "fastssl.training.online_probes"])
    mp.start_processes(worker, args=(2, port, str(tmp_path), recipe), nprocs=2, start_method="forkserver")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = figures(recipe)
    label = int(build.data.labels_of(Path(recipe["data"]["path"]))[5])
    assert {rank["mine"] for rank in ranks} == {20, 21}
    for rank in ranks:
        assert rank["few"] == [1, [label]]  # fewer images than ranks: all of them everywhere
        assert rank["figures"].keys() == alone.keys()
        assert rank["figures"] == pytest.approx(alone, rel=1e-3, abs=1e-3)
