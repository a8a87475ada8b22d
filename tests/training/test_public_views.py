"""`fastssl.views`: the loader and the views in a loop of one's own, exact, resumable, and on any number of ranks."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl import build
from fastssl.build import ranks
from fastssl.data.convert.convert import convert
from fastssl.errors import OwnWarning, UserError
from fastssl.recipe.load import load
from fastssl.training import views as public_views
from fastssl.training.loop import train

Epoch = list[tuple[Any, Tensor, Tensor]]
BATCH = 32  # of 200 images: six steps, eight images left over


@pytest.fixture
def path(tiny_data: tuple[Path, Path]) -> Path:
    return tiny_data[0]


def assert_same(one: Epoch, other: Epoch) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shapes_labels_and_positions_are_the_files(path: Path) -> None:
    views = fastssl.views(path, batch_size=BATCH, views=3, side_px=12, dtype=torch.bfloat16, device="cpu")
    epoch, labels_N = list(views), build.data.labels_of(path)
    assert len(epoch) == len(views) == 6
    for views_VBCHW, labels_B, index_B in epoch:
        assert views_VBCHW.shape == (3, BATCH, 3, 12, 12)
        assert views_VBCHW.dtype == torch.bfloat16
        assert views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels_B, labels_N[index_B])
    seen = torch.cat([index_B for _, _, index_B in epoch])
    assert len(seen.unique()) == len(seen) == 6 * BATCH


def test_the_views_are_those_of_a_run_with_the_same_recipe(path: Path) -> None:
    recipe = load(
        {
            "seed": 7,
            "device": "cpu",
            "data": {"path": str(path), "batch_size": BATCH},
            "augment": {"views": 2, "side_px": 16},
            "train": {"epochs": 1, "precision": "fp32"},
        }
    )
    device, manifest = torch.device("cpu"), build.data.manifest_of(path)
    augment = build.views.augment(recipe, manifest, device=device)
    loader = build.data.loader(recipe, path, torch.arange(200), device=device)
    expected = [(augment(batch, 0)[0], batch.labels_B, batch.index_B) for batch in loader.epoch(0, 0)]
    assert_same(list(fastssl.views(path, batch_size=BATCH, views=2, seed=7, device="cpu")), expected)


def test_epochs_follow_each_other_and_can_be_chosen(path: Path) -> None:
    views = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    first, second = list(views), list(views)
    assert not torch.equal(first[0][0], second[0][0])
    again = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    again.set_epoch(1)
    assert_same(list(again), second)
    again.set_epoch(0)
    assert_same(list(again), first)


def test_it_resumes_in_the_middle_of_an_epoch(path: Path) -> None:
    whole = list(fastssl.views(path, batch_size=BATCH, views=2, device="cpu"))
    stopped = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    for count, _ in enumerate(stopped, start=1):
        if count == 4:
            break
    state = stopped.state_dict()
    resumed = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # as a loop over epochs says again; the position stays
    assert_same(list(resumed), whole[4:])
    assert resumed.state_dict()["epoch"] == 1
    other = fastssl.views(path, batch_size=16, views=2, device="cpu")
    with pytest.raises(UserError, match="batch_size differ"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 99}, "step is 99, and an epoch has 6 steps"),
        ({"step": -1}, "step is -1"),
        ({"step": None}, "step is None"),
        ({"epoch": 1.5}, r"epoch is 1\.5"),
    ],
)
def test_a_state_or_an_epoch_that_is_none_is_refused(path: Path, change: dict[str, Any], named: str) -> None:
    views = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    with pytest.raises(UserError, match=named):
        views.load_state_dict(views.state_dict() | change)
    with pytest.raises(UserError, match="The state is a NoneType"):
        views.load_state_dict(cast(Any, None))
    with pytest.raises(UserError, match="epoch is -1"):
        views.set_epoch(-1)
    assert len(list(views)) == 6


def test_ranks_share_each_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, *_), parts = list(fastssl.views(path, batch_size=BATCH, views=2, device="cpu")), []
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            patch.setattr(ranks, "world", lambda: 2)
            parts.append(next(iter(fastssl.views(path, batch_size=BATCH, views=2, device="cpu"))))
    assert torch.equal(torch.cat([views for views, _, _ in parts], dim=1), whole[0])
    assert torch.equal(torch.cat([index for _, _, index in parts]), whole[2])


def test_views_made_before_the_ranks_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would train on all images of the global batch."""
    views = fastssl.views(path, batch_size=BATCH, views=2, device="cpu")
    next(iter(views))
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(
        UserError, match=r"rank 0 of 2, and fastssl\.views\(\.\.\.\) was called as rank 0 of 1, for other"
    ):
        next(iter(views))


def test_a_device_without_a_number_is_the_ranks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(public_views, "Views", lambda recipe, device: seen.append(device))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for device in ("cuda", "cuda:1"):
        fastssl.views(path, batch_size=BATCH, views=2, device=device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in ("cuda", "cuda:1", "auto"):
        fastssl.views(path, batch_size=BATCH, views=2, device=device)
    assert [device.index for device in seen] == [2, 1, 3, 1, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    fastssl.views(path, batch_size=BATCH, views=2, device="cuda:0")  # of those that the launcher left visible
    with pytest.raises(UserError, match="Rank 4 of this machine has no GPU: torch finds 4"):
        fastssl.views(path, batch_size=BATCH, views=2, device="cuda")


def test_what_changes_nothing_is_said(tmp_path: Path) -> None:
    convert("shapes", tmp_path / "gray.beton", count=16, side_px=16, channels=1)
    with pytest.warns(OwnWarning, match="act on 3 channels and the images have 1, so they change nothing"):
        fastssl.views(tmp_path / "gray.beton", batch_size=4, views=2, device="cpu")


def test_a_manifest_of_other_images_is_refused(path: Path, tmp_path: Path) -> None:
    convert("shapes", tmp_path / "new.beton", count=16, side_px=16, channels=1)
    shutil.copy(f"{path}.json", tmp_path / "new.beton.json")
    with pytest.raises(
        UserError, match=r"has 16 images of 1 channels, and its manifest new\.beton\.json says 200 of 3"
    ):
        fastssl.views(tmp_path / "new.beton", batch_size=4, views=2, device="cpu")


def test_where_pixels_are_to_be_held_decides_the_loader(path: Path) -> None:
    recipe = {"data": {"path": str(path)}, "train": {"epochs": 1}}
    for memory, device in (("host", "cuda"), ("mmap", "cuda"), ("mmap", "cpu")):
        chosen, reason = build.data.loader_choice(load(recipe, [f"data.memory={memory}"]), path, torch.device(device))
        assert (chosen, f"data.memory is {memory}" in reason) == ("resident", True)


def test_a_side_that_is_given_is_taken_whatever_the_default(path: Path) -> None:
    views, _, _ = next(iter(fastssl.views(path, batch_size=BATCH, views=2, side_px=256, device="cpu")))
    assert views.shape[-2:] == (256, 256)


def test_a_table_of_views_with_two_sides_gives_two_tensors(path: Path) -> None:
    table = [fastssl.View(side_px=16), {"side_px": 16, "hflip_p": 1.0}, fastssl.View(side_px=8)]
    large_VBCHW, small_VBCHW = next(iter(fastssl.views(path, batch_size=BATCH, views=table, device="cpu")))[0]
    assert large_VBCHW.shape == (2, BATCH, 3, 16, 16)
    assert small_VBCHW.shape == (1, BATCH, 3, 8, 8)
    torch.testing.assert_close(large_VBCHW[1], large_VBCHW[0].flip(-1), rtol=0, atol=1e-5)


def test_a_loop_of_ones_own_learns(path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8))
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    views, losses = fastssl.views(path, batch_size=BATCH, views=4, device="cpu"), []
    for _ in range(10):
        for views_VBCHW, _, _ in views:
            z_VBD = network(views_VBCHW.flatten(0, 1)).view(4, BATCH, -1)
            loss = fastssl.losses.barlow_twins(z_VBD)["loss"]
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.85 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": torch.int64}, "dtype"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 500}, "batch_size"),
        ({"views": 1}, "views"),
        ({"views": [{"side_px": 16}]}, "at least two"),
        ({"views": ["cifar", "cifar"]}, "A view is 'cifar'"),
        ({"views": [{"sidepx": 16}] * 2}, "did you mean side_px"),
        ({"preset": "imagnet"}, "preset"),
        ({"path": "nothing.beton"}, "nothing.beton"),
        ({"loader": "fast"}, "loader"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": None}, "device is None"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"views": None}, "views is None"),
        ({"views": 4.0}, r"views is 4\.0"),
        ({"views": "4"}, "views is '4'"),
        ({"views": True}, "views is True"),
        ({"side_px": 0}, "side_px"),
        ({"views": [fastssl.View(side_px=16)] * 2, "side_px": 24}, "side_px and preset are of a number"),
        ({"path": "/"}, "path: '/' names no file"),
        ({"path": None}, "path: None is a NoneType"),
    ],
)
def test_mistakes_name_the_argument(path: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        fastssl.views(**{"path": path, "batch_size": BATCH, "device": "cpu"} | arguments)


def test_a_view_names_its_unknown_and_wrong_fields() -> None:
    with pytest.raises(UserError, match=r"sidepx.*hflip_p|hflip_p.*sidepx"):
        fastssl.View(sidepx=16, hflip_p=2)


def test_train_takes_the_same_table(path: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    table = [fastssl.View(side_px=16, hflip_p=0.5)] * 3
    tiny = tiny_recipe | {"train": tiny_recipe["train"] | {"epochs": 1}}
    assert train(tiny, run_dir=tmp_path / "run", policy=table)["views"] == 3 * 5 * 32
