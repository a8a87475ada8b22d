"""The preview shows what the network sees: its views are the backend's, its words the drawn parameters."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import build
from fastssl.errors import UserError
from fastssl.recipe.load import load
from fastssl.report.preview import CELL_PX, GAP_PX, OPERATIONS, pictures, plain, preview, sheet, words

CONFIG = {"train": {"epochs": 1}, "augment": {"views": 3, "side_px": 16}}


def test_preview_writes_two_readable_pictures(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = load({**CONFIG, "data": {"path": str(tiny_data[0])}})
    files = preview(recipe, tmp_path / "a" / "views.png", images=2)
    with Image.open(files[0]) as grid, Image.open(files[1]) as operations:
        assert grid.width > 4 * 100
        assert operations.height > len(OPERATIONS) * 100
        assert len(np.unique(np.asarray(grid).reshape(-1, 3), axis=0)) > 100


def test_the_views_of_an_early_epoch_are_as_small_as_training_makes_them(
    tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    growing = {"views": 2, "side_px": 16, "progressive": {"from_px": 8, "until": 1.0, "step_px": 8}}
    recipe = load({"data": {"path": str(tiny_data[0])}, "augment": growing, "train": {"epochs": 3}})

    def view(epoch: int) -> np.ndarray:
        with Image.open(preview(recipe, tmp_path / f"{epoch}.png", images=1, epoch=epoch)[0]) as grid:
            x = CELL_PX + 2 * GAP_PX  # right of the image itself
            return np.asarray(grid.convert("RGB"))[GAP_PX : GAP_PX + CELL_PX, x : x + CELL_PX]

    blocks = [view(epoch).reshape(8, CELL_PX // 8, 8, CELL_PX // 8, 3) for epoch in (0, 2)]
    spread = [float(np.ptp(block, axis=(1, 3)).mean()) for block in blocks]
    assert spread[0] == 0 < spread[1]  # 8 px, enlarged


def test_pictures_are_the_networks_views_before_normalization(tiny_data: tuple[Path, Path]) -> None:
    recipe = load({**CONFIG, "data": {"path": str(tiny_data[0])}})
    manifest, device = build.data.manifest_of(recipe.data.path), torch.device("cpu")
    batch = next(iter(build.data.ordered_loader(recipe, recipe.data.path, torch.arange(4), device=device).epoch(0)))
    augment = build.views.augment(recipe, manifest, device=device)
    (views_VBCHW,) = augment(batch, 5)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (augment.mean_C, augment.std_C))
    restored = views_VBCHW.float() * std + mean
    shown = torch.from_numpy(np.stack([np.stack(view) for view in pictures(plain(augment), batch, 5)[0]]))
    assert float((restored.permute(0, 1, 3, 4, 2) * 255 - shown.float()).abs().max()) < 3.0  # bf16 against uint8


def test_words_name_only_what_changes() -> None:
    from fastssl.augment.policy import NO_SOLARIZE, Column

    drawn = torch.zeros(len(Column))
    drawn[Column.HEIGHT] = drawn[Column.WIDTH] = 16
    drawn[Column.BRIGHTNESS] = drawn[Column.CONTRAST] = drawn[Column.SATURATION] = 1.0
    drawn[Column.SOLARIZE] = NO_SOLARIZE
    assert words(drawn) == "crop 16 x 16\nat 0, 0"
    drawn[Column.HFLIP], drawn[Column.GRAY], drawn[Column.HUE] = 1, 1, 0.05
    drawn[Column.BRIGHTNESS] = 1.38
    assert words(drawn).splitlines()[2:] == ["mirrored", "brightness x 1.38", "hue +0.05", "gray"]


def test_no_caption_leaves_its_column() -> None:
    pixels = np.full((4, 4, 3), 255, np.uint8)
    label = "\n".join(["blur sigma max px 0.5", "random resized crop", "saturation x 1.38"])
    picture = np.asarray(sheet([[(pixels, label)] * 3])).min(axis=2)
    for x in range(4):  # the gaps around and between the columns stay white
        gap = picture[:, x * (CELL_PX + GAP_PX) : x * (CELL_PX + GAP_PX) + GAP_PX]
        assert (gap == 255).all()
    assert (picture < 128).any()


def test_a_full_disk_leaves_the_earlier_pictures(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load({**CONFIG, "data": {"path": str(tiny_data[0])}})
    before = {path: path.read_bytes() for path in preview(recipe, tmp_path / "views.png", images=1)}

    def full(self: Image.Image, path: Path, kind: str) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        preview(recipe, tmp_path / "views.png", images=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_target_that_cannot_be_written_is_explained(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = load({**CONFIG, "data": {"path": str(tiny_data[0])}})
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        preview(recipe, tmp_path / "folder.png", images=1)
