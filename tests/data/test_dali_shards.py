"""Shards streamed by DALI's own reader: every sample once, its number, label and pixels, whatever the order."""

import gc
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loaders import image_of, indices

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

import fastssl
from fastssl import build
from fastssl.augment.draws import permutation
from fastssl.data.convert.convert import convert
from fastssl.data.decode import decode_image
from fastssl.data.loaders.dali_shards import DaliStream, open_stream
from fastssl.data.loaders.shard_index import read_index
from fastssl.data.sources import open_source
from fastssl.errors import UserError
from fastssl.recipe.load import load

COUNT, SIDE_PX = 50, 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty shapes of 16 px as PNG, in several shards."""
    folder = tmp_path_factory.mktemp("stream") / "shards"
    manifest = convert("shapes", folder, format="webdataset", count=COUNT, side_px=SIDE_PX, shard_mb=0.02)
    assert manifest.shards is not None
    assert manifest.shards > 3
    return folder


def stream(folder: Path, **options: object) -> DaliStream:
    defaults = {"device": "cpu", "batch_size": 8, "order": partial(permutation, 0), "seed": 0, "threads": 2}
    return open_stream(folder, **(defaults | options))


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("uniform", [True, False])
def test_every_sample_once_with_its_number_pixels_and_label(shards, uniform, layout):
    items = list(open_source(shards).items())
    shape = (SIDE_PX, SIDE_PX, 3) if uniform else None
    loader = stream(shards, drop_last=False, image_shape=shape, layout=layout)
    batches = list(loader.epoch(0))  # held, so that a buffer used twice would show
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    assert len(loader) == 7
    assert sorted(indices(batches)) == list(range(COUNT))
    for batch in batches:
        assert (batch.sizes_B2 is None) == uniform
        for k, i in enumerate(batch.index_B.tolist()):
            assert isinstance(items[i].data, bytes)
            np.testing.assert_array_equal(image_of(batch, k), decode_image(items[i].data, key=""))
            assert batch.labels_B[k] == items[i].label


def test_images_of_different_sizes(tmp_path):
    from test_convert import photographs

    files = photographs(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", format="webdataset")
    expected = [decode_image(item.data, key="", channels=3) for item in open_source(tmp_path / "out").items()]
    assert len(expected) == len(files)
    for layout in ("flat", "padded"):
        (batch,) = stream(tmp_path / "out", batch_size=len(expected), layout=layout).epoch(0)
        for k, i in enumerate(batch.index_B.tolist()):
            height, width = batch.sizes_B2[k].tolist()
            image = image_of(batch, k) if layout == "flat" else batch.images[k, :height, :width].numpy()
            assert image.shape == expected[i].shape
            assert np.abs(image.astype(int) - expected[i]).mean() < 2  # DALI's JPEG decoder rounds in its own way


def test_epochs_differ_and_repeat_and_depend_on_the_seed(shards):
    loader = stream(shards)
    first, second = (indices(loader.epoch(epoch)) for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)
    assert indices(stream(shards).epoch(0)) == first
    assert indices(stream(shards, order=partial(permutation, 1), seed=1).epoch(0)) != first


def test_restart_at_any_step(shards):
    loader = stream(shards)
    whole = [batch.index_B.tolist() for batch in loader.epoch(3)]
    for start in range(len(whole) + 1):
        assert [batch.index_B.tolist() for batch in loader.epoch(3, start)] == whole[start:]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_disjoint_parts_that_make_up_the_whole(shards, world):
    ranks = [stream(shards, batch_size=6, drop_last=False, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {9}
    assert sorted(i for rank in ranks for i in indices(rank.epoch(1))) == list(range(COUNT))
    whole = [stream(shards, batch_size=6, rank=rank, world=world) for rank in range(world)]
    assert all([len(batch) for batch in rank.epoch(1)] == [6 // world] * 8 for rank in whole)


def test_breaking_off_leaves_no_thread(shards):
    before = sorted(thread.name for thread in threading.enumerate())
    for _ in stream(shards).epoch(0):
        break
    gc.collect()
    assert sorted(thread.name for thread in threading.enumerate()) == before


def test_unlabeled_shards(tmp_path):
    convert("shapes", tmp_path / "out", split="unlabeled", format="webdataset", count=9, side_px=8)
    (batch,) = stream(tmp_path / "out", batch_size=9).epoch(0)
    assert batch.labels_B.tolist() == [-1] * 9


def test_an_image_that_cannot_be_decoded_is_an_error(tmp_path):
    convert("shapes", tmp_path / "out", format="webdataset", count=9, side_px=8)
    (shard,) = (tmp_path / "out").glob("*.tar")
    data = bytearray(shard.read_bytes())
    at = int(read_index(tmp_path / "out").offsets[0][4])
    data[at : at + 60] = b"\0" * 60
    shard.write_bytes(data)
    with pytest.raises(UserError, match="DALI cannot read"):
        list(stream(tmp_path / "out", batch_size=3).epoch(0))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("shard-000000.idx", None, "missing"),
        ("shard-000000.idx", "v1.2 7\n", "no index"),
        ("shard-000000.idx", "v1.2 1\ncls 512 1 a.cls\n", "has no image"),
    ],
)
def test_a_missing_or_damaged_index_is_refused(shards, tmp_path, name, content, said):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as raised:
        stream(tmp_path)
    assert name in raised.value.what


def test_wrong_numbers_are_errors_with_a_remedy(shards, tmp_path):
    with pytest.raises(UserError, match="larger than the set of 50 images"):
        stream(shards, batch_size=51)
    with pytest.raises(UserError, match=r"Set data\.batch_size to 6 or 9"):
        stream(shards, batch_size=8, world=3)
    with pytest.raises(UserError, match=r"holds no \.tar shards"):
        stream(tmp_path)


def recipe_over(shards: Path, probe: Path, tiny_recipe: dict, **data: object):
    tiny_recipe["data"] = {"path": str(shards), "probe_path": str(probe), "val_count": 40, "batch_size": 16, **data}
    tiny_recipe["train"]["epochs"] = 1
    return tiny_recipe


def test_pretraining_from_shards_and_probing_with_a_beton(shards, tiny_data, tiny_recipe, tmp_path):
    started: list[dict] = []
    recipe = recipe_over(shards, tiny_data[0], tiny_recipe, test_path=str(tiny_data[1]))
    summary = fastssl.train(recipe, run_dir=tmp_path / "run", observe=started.append)
    assert summary["steps"] == COUNT // 16
    assert "test_ridge_pct" in summary
    assert started[0]["loader"].startswith("dali: a folder of shards")
    assert any("No image of a stream can be picked" in record.get("message", "") for record in started)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"fraction": 0.5}, r"data\.fraction"),
        ({"probe_path": None}, r"data\.probe_path"),
        ({"loader": "ffcv"}, r"data\.loader"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_training(shards, tiny_data, tiny_recipe, tmp_path, data, named):
    with pytest.raises(UserError, match=named):
        fastssl.train(recipe_over(shards, tiny_data[0], tiny_recipe, **data), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stream_without_dali_names_its_extra(shards, tiny_data, tiny_recipe, monkeypatch):
    monkeypatch.setattr("fastssl.build.data.installed", lambda package: False)
    recipe = load(recipe_over(shards, tiny_data[0], tiny_recipe))
    with pytest.raises(UserError, match="only the dali loader") as raised:
        build.data.loader(recipe, shards, torch.arange(COUNT), device=torch.device("cpu"))
    assert "fastssl-vision[dali]" in raised.value.fix


def test_gray_shards_stay_gray(tmp_path):
    convert("shapes", tmp_path / "out", format="webdataset", count=9, side_px=8, channels=1)
    expected = [decode_image(item.data, key="", channels=1) for item in open_source(tmp_path / "out").items()]
    (batch,) = stream(tmp_path / "out", batch_size=9, channels=1, image_shape=(8, 8, 1)).epoch(0)
    for image, i in zip(batch.images.numpy(), batch.index_B.tolist(), strict=True):
        np.testing.assert_array_equal(image, expected[i])


def test_padded_and_flat_batches_give_the_same_views(tmp_path):
    from test_convert import photographs

    from fastssl.augment.augment import Augment
    from fastssl.augment.backend import backend_of
    from fastssl.augment.policy import View
    from fastssl.recipe.schema import ViewSpec

    photographs(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", format="webdataset")
    view = View(**ViewSpec(side_px=24, crop="random_resized", hflip_p=0.5).model_dump())
    augment = Augment((view, view), (0.5,) * 3, (0.25,) * 3, 0, torch.float32, backend_of("torch"))
    views = []
    for layout in ("flat", "padded"):
        (batch,) = stream(tmp_path / "out", batch_size=4, layout=layout).epoch(0)
        views += augment(batch, 0)
    assert torch.equal(*views)
