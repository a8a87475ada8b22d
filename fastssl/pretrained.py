"""A trained backbone, ready to turn images into features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastssl import build, checkpoint, models
from fastssl.augment.engine import Augment
from fastssl.errors import UserError
from fastssl.recipe import Recipe
from fastssl.recipe import load as load_recipe

Images = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | Sequence[npt.NDArray[np.uint8]] | Tensor


@dataclass(frozen=True)
class Pretrained:
    """A backbone with the preprocessing it was trained with.

    Attributes:
        backbone: normalised images (B, C, H, W) to features (B, F).
        recipe: of the run.
        device: where the backbone is.
    """

    backbone: nn.Module
    recipe: Recipe
    device: torch.device
    clean: Augment

    def embed(self, images: Images, *, batch_size: int = 512) -> npt.NDArray[np.float32]:
        """Features of images, in their order.

        Args:
            images: uint8 or uint16 (N, H, W, C), or a sequence of (H, W, C) arrays of any sizes.
            batch_size: images in one forward pass.

        Returns:
            float32 (N, F).

        Raises:
            UserError: when the images have another shape, type or channel count.
        """
        parts = [self.batch(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        if not parts:
            raise UserError("There are no images to embed.", "Pass at least one (H, W, C) image.")
        return np.concatenate(parts)

    def batch(self, images: Images) -> npt.NDArray[np.float32]:
        """Features of one batch; images of different sizes are resized one by one."""
        same = isinstance(images, np.ndarray | Tensor) or len({np.shape(image) for image in images}) == 1
        stacks = [images] if same else [[image] for image in images]
        rows = []
        for stack in stacks:
            pixels = torch.as_tensor(stack if isinstance(stack, Tensor) else np.stack(list(stack)))
            self.check(pixels)
            index_B = torch.arange(len(pixels), device=self.device)
            (views_VBCHW,) = self.clean(pixels.to(self.device), index_B, 0)
            rows.append(models.embed(self.backbone, views_VBCHW[0], autocast=build.autocast(self.recipe)).cpu())
        return torch.cat(rows).numpy()

    def check(self, pixels: Tensor) -> None:
        channels = len(self.clean.mean_C)
        if pixels.dtype not in (torch.uint8, torch.uint16) or pixels.ndim != 4 or pixels.shape[-1] != channels:
            raise UserError(
                f"Images are {str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}.",
                f"Pass uint8 or uint16 images of shape (N, H, W, {channels}), as the backbone was trained on.",
            )


def load(run_dir: str | Path, *, device: str = "auto") -> Pretrained:
    """The backbone of a run, from its newest whole checkpoint.

    Args:
        run_dir: what `train` wrote.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: when the folder is not a run or its checkpoints are damaged.
    """
    folder = Path(run_dir)
    recipe, manifest = run_files(folder)
    recipe = load_recipe(recipe, [f"device={device}"])
    where = build.device(recipe)
    network = build.network(recipe, in_channels=manifest["channels"], where=where)
    try:
        network.load_state_dict(checkpoint.load_weights(folder))
    except RuntimeError as error:
        fix = "Give a run folder nobody edited."
        raise UserError(f"The weights in {folder} do not fit its recipe.", fix) from error
    clean = build.clean_view(recipe, manifest, where=where)
    return Pretrained(backbone=network.backbone.eval(), recipe=recipe, device=where, clean=clean)


def run_files(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and data manifest of a run folder."""
    fix = "Give the folder that `fastssl train` wrote (it holds recipe.yaml and data.json)."
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run.", fix)
    recipe = load_recipe(folder / "recipe.yaml")
    try:
        manifest = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        assert {"channels", "mean", "std", "side_px"} <= set(manifest)
    except (OSError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{folder / 'data.json'} is missing or damaged.", fix) from error
    return recipe, manifest
