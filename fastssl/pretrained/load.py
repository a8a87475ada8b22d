"""A trained network with the preprocessing it was trained with: from a run, a checkpoint, an export, or bare weights.

Shapes are compared before anything large is built, so that an edited recipe or a foreign file is a sentence, not a
crash.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.data.batch import Batch
from fastssl.data.convert.prepare import Shape
from fastssl.data.manifest import Manifest
from fastssl.errors import UserError, option
from fastssl.models import pretrainer
from fastssl.pretrained.preparation import prepare_pixels, read, shape_of
from fastssl.recipe.load import load as load_recipe
from fastssl.recipe.schema import Recipe
from fastssl.runs import checkpoint as checkpoints
from fastssl.runs.directory import comparable, different_keys
from fastssl.training import own_parts
from fastssl.training.plain import plain_torch
from fastssl.training.threads import within_cores

METADATA_KEY = "fastssl"  # of an exported .safetensors file's metadata: the record of the export, as JSON
FIX_FIT = "Give the weights of that recipe, and a run folder nobody edited."
EXPORTED = "model.safetensors"  # in a folder for Hugging Face
Images = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | Tensor | Sequence[npt.NDArray[Any] | Tensor | str | Path]


@dataclass(frozen=True)
class Pretrained:
    """A backbone with the preprocessing it was trained with.

    Attributes:
        backbone: normalized images (B, C, H, W) to features (B, F).
        recipe: of the run.
        device: where the backbone is.
        clean: images to the one view that changes nothing but the size.
        projector: features to embeddings (B, D), or None when the weights hold the backbone alone.
        manifest: of the data it was trained on.
        digest: SHA-256 of the weights.
        run_dir: folder of the run, or None for weights outside of one.
        step: of the checkpoint, None for weights outside of one.
        weights: "ema" (averaged, see optim.ema) or "raw"; None for weights outside of a run.
    """

    backbone: nn.Module
    recipe: Recipe
    device: torch.device
    clean: Augment
    projector: nn.Module | None
    manifest: Manifest
    digest: str
    run_dir: Path | None
    step: int | None = None
    weights: checkpoints.Kind | None = None

    def __repr__(self) -> str:
        side_px, step = self.clean.views[0].side_px, "" if self.step is None else f", step {self.step}"
        return f"Pretrained({self.recipe.model.backbone}, {side_px} px{step}, on {self.device})"

    @property
    @plain_torch()
    def features_dim(self) -> int:
        """F."""
        return pretrainer.features_dim(
            self.backbone, side_px=self.clean.views[0].side_px, in_channels=len(self.clean.mean_C)
        )

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of matrix products when features are computed, None for float32."""
        return build.hardware.features_autocast(self.recipe, self.device)

    @plain_torch()
    @within_cores()
    def embed(self, images: Images, *, batch_size: int = 512) -> npt.NDArray[np.float32]:
        """Features of images, in their order.

        Args:
            images: uint8 or uint16 (N, H, W, C), or a sequence of (H, W, C) arrays of any sizes, or of paths of image
                files, which are decoded as `convert` does it.
            batch_size: images in one forward pass.

        Returns:
            float32 (N, F).

        Raises:
            UserError: when the images have another shape, type or channel count, or cannot be read.
        """
        if not hasattr(batch_size, "__index__") or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}.", "Set it to 1 or more.")
        if isinstance(images, str | bytes) or not isinstance(images, np.ndarray | Tensor | Sequence):
            raise UserError(
                f"images is a {type(images).__name__}.", "Pass an array of images, or a list: [image, ...]."
            )
        if isinstance(images, np.ndarray | Tensor) and images.ndim != 4:
            self.check(images)
        parts = [self.batch(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        if not parts:
            raise UserError("images is empty: there is nothing to embed.", "Pass at least one (H, W, C) image.")
        return np.concatenate(parts)

    def batch(self, images: Images) -> npt.NDArray[np.float32]:
        """Features of one batch, prepared as `convert` prepared the images of training."""
        prepared = self.prepared(images)
        same = isinstance(prepared, np.ndarray | Tensor) or len({image.shape for image in prepared}) == 1
        stacks = [prepared] if same else [[image] for image in prepared]
        rows = []
        for stack in stacks:
            pixels = torch.as_tensor(stack if isinstance(stack, Tensor) else np.stack(list(stack)))
            self.check(pixels)
            index_B = torch.arange(len(pixels), device=self.device)
            (views_VBCHW,) = self.clean(Batch(pixels.to(self.device), torch.full_like(index_B, -1), index_B), 0)
            rows.append(pretrainer.embed(self.backbone, views_VBCHW[0], autocast=self.autocast).cpu())
        return torch.cat(rows).numpy()

    def prepared(self, images: Images) -> npt.NDArray[Any] | Tensor | list[npt.NDArray[Any]]:
        """The same images where they are as the conversion left those of training; else each by itself."""
        shape = shape_of(self.manifest)
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            resized = shape.side_px or shape.max_side_px
            raw = shape.stretch is not None and shape.dtype == "uint16"  # the stretched look alike
            if (
                str(images.dtype).endswith(shape.dtype)
                and not raw
                and (not resized or tuple(images.shape[1:3]) == (shape.side_px, shape.side_px))
            ):
                return images
        arrays = [array_of(image, shape) for image in images]
        for array in arrays:
            self.check(array[None])
        return [prepare_pixels(array, shape) for array in arrays]

    def check(self, pixels: Tensor | npt.NDArray[Any]) -> None:
        channels = len(self.clean.mean_C)
        if (
            str(pixels.dtype).removeprefix("torch.") not in ("uint8", "uint16")
            or pixels.ndim != 4
            or pixels.shape[-1] != channels
            or 0 in pixels.shape[1:3]
        ):
            raise UserError(
                f"images is {str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}.",
                f"Pass uint8 or uint16 images of shape (N, H, W, {channels}), as the backbone was trained on.",
            )


def array_of(image: npt.NDArray[Any] | Tensor | str | Path, shape: Shape) -> npt.NDArray[Any]:
    """One image (H, W, C): decoded where it is a path."""
    if isinstance(image, str | Path):
        return read(image, shape)
    if not isinstance(image, np.ndarray | Tensor) and not hasattr(image, "__array_interface__"):  # Pillow's has it
        raise UserError(f"images holds a {type(image).__name__}.", "Pass (H, W, C) arrays or paths of image files.")
    return np.asarray(image.cpu() if isinstance(image, Tensor) else image)


@plain_torch()
def load(
    source: str | Path,
    *,
    device: str = "auto",
    recipe: str | Path | Recipe | None = None,
    backbone: nn.Module | None = None,
    checkpoint: str | Path = "last",
    weights: checkpoints.Kind | None = None,
) -> Pretrained:
    """The network of a run, or of a weights file. A damaged newest checkpoint is passed over with a warning.

    Args:
        source: what `train` wrote, one of its checkpoints, what `export` wrote, or a .safetensors file.
        device: "auto", "cpu", "cuda" or "mps".
        recipe: how weights that lie outside of a run were trained.
        backbone: the module of a run that was given one; it is filled with the weights.
        checkpoint: of a run: "last" (the newest whole one), "best" (of the highest accuracy on held-out images), or a
            checkpoint's folder or name.
        weights: of a run: "ema" or "raw"; when None the averaged ones, if the run has them.

    Raises:
        UserError: when the folder is not a run, or the weights are damaged or do not fit the recipe.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"source is a {type(source).__name__}.", "Pass the path of a run, or of a .safetensors file.")
    path = Path(source) / EXPORTED if (Path(source) / EXPORTED).is_file() else Path(source)
    run_dir = run_folder(path)
    record = export_record(path)
    if recipe is not None:
        resolved = load_recipe(recipe)
        own = record[0] if record else load_recipe(run_dir / "recipe.yaml") if run_dir else resolved
        check_same(resolved, own, path)
        manifest = build.data.manifest_of(resolved.data.path)
    else:
        resolved, manifest = record or run_files(run_dir or path)
    resolved = load_recipe(resolved, [f"device={device}"])
    # what the backbone started from is history: only its shape is needed here
    bare = load_recipe(resolved, ["model.weights=null", "model.freeze=0", "train.gradient_checkpointing=false"])
    check_backbone(bare, backbone, path)
    on = build.hardware.device(bare)
    tensors, step, kind = checkpoints.load_with_step(checkpoints.choose(path, checkpoint), weights)
    wanted = wanted_tensors(bare, manifest.channels, path, backbone)
    named = whole_names(tensors, wanted)
    check_fit(named, wanted, path)
    network = build.model.network(bare, in_channels=manifest.channels, device=on, backbone=backbone)
    network.load_state_dict(named, strict=False)
    alone = len(network.projector.state_dict()) > 0 and not any(name.startswith("projector.") for name in named)
    return Pretrained(
        backbone=network.backbone.eval(),
        recipe=resolved,
        device=on,
        clean=build.views.clean_view(resolved, manifest, device=on),
        projector=None if alone else network.projector.eval(),
        manifest=manifest,
        digest=digest_of(named),
        run_dir=run_dir,
        step=step,
        weights=kind,
    )


def check_same(given: Recipe, own: Recipe, path: Path) -> None:
    """UserError where a recipe is given for weights that were trained by another; its data files may be elsewhere."""
    keys = different_keys(comparable(given), comparable(own))
    if differing := [key for key in keys if key not in ("name", "device")]:
        raise UserError(
            f"{path} has its own recipe, and the one given differs in {', '.join(differing)}.",
            f"Leave {option('recipe')} out.",
        )


def check_backbone(recipe: Recipe, backbone: nn.Module | None, path: Path) -> None:
    """A run that was given a module cannot be rebuilt from its recipe."""
    if backbone is not None:
        own_parts.check_backbone(backbone)
        return
    if recipe.model.backbone == build.model.CUSTOM:
        raise UserError(
            f"{path} was trained with a backbone of its own.",
            "Pass the same: fastssl.load(..., backbone=module); evaluate, embed and export take what it gives.",
        )
    build.preflight.check(recipe)


def export_record(path: Path) -> tuple[Recipe, Manifest] | None:
    """Recipe and data manifest that an exported .safetensors file carries, None for anything else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
        if record is None:
            return None
        return load_recipe(record["recipe"]), Manifest.from_json(record["data"])
    except (OSError, SafetensorError):
        return None  # whoever reads the weights says what is wrong with them
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"The record that {path} carries is damaged.", "Export it again.") from error


def run_folder(path: Path) -> Path | None:
    """The run that a run folder, a checkpoint or a file inside it belongs to, or None."""
    nearest = (path, *path.absolute().parents[:3])
    # A recipe alone may lie next to weights from anywhere.
    recipes = (folder for folder in nearest if (folder / "recipe.yaml").is_file())
    return next((f for f in recipes if (f / "environment.json").is_file() or (f / "checkpoints").is_dir()), None)


def whole_names(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in a run's weights; a file of the backbone alone has its own, maybe with torchvision's classifier.

    Args:
        weights: of the file.
        wanted: as the network names them, since parts of a backbone may be called "backbone" or "fc" too.
    """
    alone = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    of_backbone = {name for name in wanted if name.startswith("backbone.")}
    if of_backbone & weights.keys() or not of_backbone & alone.keys():
        return dict(weights)
    return {name: tensor for name, tensor in alone.items() if name in wanted or not name.startswith("backbone.fc.")}


def wanted_tensors(recipe: Recipe, channels: int, path: Path, backbone: nn.Module | None) -> dict[str, Tensor]:
    """What the recipe's network holds, in names and shapes alone: an edited width may ask for terabytes.

    A backbone that is given has its memory already, and may be one that cannot be copied.
    """
    try:
        if backbone is None:
            with torch.device("meta"):
                network = build.model.network(recipe, in_channels=channels, device=torch.device("meta"))
            return dict(network.state_dict())
        side_px = build.model.sides_px(recipe)[0]
        features_dim = pretrainer.features_dim(backbone, side_px=side_px, in_channels=channels)
        with torch.device("meta"):
            projector = build.model.projector(recipe, features_dim)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"The network of {path}'s recipe cannot be built.", FIX_FIT) from error
    parts = {"backbone": backbone, "projector": projector}
    return {f"{part}.{name}": tensor for part in parts for name, tensor in parts[part].state_dict().items()}


def check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights whose names or shapes are not the network's; a projector may be absent as a whole."""
    if not any(name.startswith("projector.") for name in weights):
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("projector.")}
    for name in sorted({*wanted, *weights}):
        if name not in wanted or name not in weights or wanted[name].shape != weights[name].shape:
            raise UserError(f"The weights in {path} do not fit its recipe: {name} differs.", FIX_FIT)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, by which results are distinguished."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run_files(folder: Path) -> tuple[Recipe, Manifest]:
    """Recipe and data manifest of a run folder."""
    fix = (
        "Give the folder that `fastssl train` wrote (it holds recipe.yaml and data.json), or weights "
        f"with {option('recipe')}."
    )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run.", fix)
    recipe = load_recipe(folder / "recipe.yaml")
    try:
        return recipe, Manifest.from_json(json.loads((folder / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'data.json'} is missing or damaged.", fix) from error
