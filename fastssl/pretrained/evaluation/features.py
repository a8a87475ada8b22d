"""Features of a part's images, extracted in one pass for every number of views and layer, and kept on disk.

The mean over V views is one clean view and V - 1 augmented ones, as arXiv 2312.10725 evaluates. A cache file's name
is a digest of all that decides its content, and the content carries its own: what does not match is made anew.

N images, B batch, V views, F features or embedding dimensions.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.data.batch import Batch
from fastssl.errors import UserError, option
from fastssl.models import pretrainer
from fastssl.pretrained.evaluation.splits import Part
from fastssl.pretrained.load import Pretrained
from fastssl.recipe.load import load as load_recipe
from fastssl.runs.files import atomic_write
from fastssl.training.online_probes import views_of

Key = tuple[int, str]
Progress = Callable[[str, int, int], None]
LAYERS = ("backbone", "projector")


def features(
    net: Pretrained,
    part: Part,
    *,
    views: Sequence[int],
    layers: Sequence[str],
    folder: Path | None,
    progress: Progress | None = None,
) -> dict[Key, Tensor]:
    """Features float32 (N, F) of each (number of views, layer), on the network's device.

    Args:
        net: whose features.
        part: of which images.
        views: numbers of views to average over, >= 1; 1 is the clean view.
        layers: "backbone" and "projector".
        folder: of the cache; None keeps nothing.
        progress: called with (file name, images done, images in all).
    """
    keys = list(dict.fromkeys((count, layer) for count in views for layer in layers))
    files = {key: folder / f"{name_of(net, part, key)}.safetensors" if folder else None for key in keys}
    by_key = {key: rows for key, file in files.items() if file and (rows := read(file, len(part.rows_N))) is not None}
    missing = [key for key in keys if key not in by_key]
    if missing:
        for key, rows in extract(net, part, missing, progress).items():
            file, by_key[key] = files[key], rows
            if file:
                with contextlib.suppress(OSError):  # the next evaluation extracts them again; `evaluate` says so
                    write(file, rows)
    return {key: by_key[key].to(net.device) for key in keys}


def at_side(net: Pretrained, side_px: int) -> Pretrained:
    """The same network, given images of another side.

    Raises:
        UserError: when the backbone does not take them.
    """
    channels = len(net.clean.mean_C)
    pretrainer.features_dim(net.backbone, side_px=side_px, in_channels=channels, setting=option("side_px"))
    recipe = load_recipe(net.recipe, [f"evaluate.side_px={side_px}"])
    return replace(net, recipe=recipe, clean=build.views.clean_view(recipe, net.manifest, device=net.device))


def extract(net: Pretrained, part: Part, keys: Sequence[Key], progress: Progress | None) -> dict[Key, Tensor]:
    loader = build.data.ordered_loader(net.recipe, part.path, part.rows_N, device=net.device)
    parts: dict[Key, list[Tensor]] = {key: [] for key in keys}
    done = 0
    for batch in loader.epoch(0):
        for key, rows in of_batch(net, batch, keys):
            parts[key].append(rows.cpu())
        done += len(batch)
        if progress:
            progress(part.path.name, done, len(part.rows_N))
    return {key: torch.cat(rows) for key, rows in parts.items()}


@torch.no_grad()
def of_batch(net: Pretrained, batch: Batch, keys: Sequence[Key]) -> Iterator[tuple[Key, Tensor]]:
    """(key, (B, F)) for each key, as the running sum over views passes it."""
    layers, most = {layer for _, layer in keys}, max(count for count, _ in keys)
    total: dict[str, Tensor] = {}
    for view, augment in enumerate(view_by_view(net, most)):
        h_BF = pretrainer.embed(
            net.backbone,
            views_of(augment, batch, view)[0][0],
            autocast=net.autocast,
        )
        for layer in layers:
            rows = h_BF if layer == "backbone" else project(net, h_BF)
            total[layer] = total[layer] + rows if layer in total else rows
        yield from ((key, total[key[1]] / key[0]) for key in keys if key[0] == view + 1)


def view_by_view(net: Pretrained, count: int) -> Iterator[Augment]:
    """The clean view, then the recipe's own rows in turn (its large ones); one at a time, so memory holds one."""
    yield net.clean
    rows = large_rows(net)
    for i in range(count - 1):
        yield replace(net.clean, views=(rows[i % len(rows)],))


def large_rows(net: Pretrained) -> list[Any]:
    rows = build.views.table(net.recipe)
    side_px = max(row.side_px for row in rows)
    return [row for row in rows if row.side_px == side_px]


def project(net: Pretrained, h_BF: Tensor) -> Tensor:
    if net.projector is None:
        raise UserError(
            "These weights hold the backbone alone, so there is no projector layer.",
            f"Leave {option('layers')} at backbone, or give the run.",
        )
    z_BD: Tensor = net.projector(h_BF.float())
    return z_BD


def name_of(net: Pretrained, part: Part, key: Key) -> str:
    """Digest of all that decides the features."""
    count, layer = key
    what = {
        "weights": net.digest,
        "data": part.manifest.digest,
        "rows": hashlib.sha256(part.rows_N.numpy().tobytes()).hexdigest(),
        "views": count,
        "layer": layer,
        "clean": [asdict(view) for view in net.clean.views],
        "augmented": [asdict(view) for view in large_rows(net)] if count > 1 else [],
        "seed": net.recipe.seed if count > 1 else 0,
        "normalized": [net.clean.mean_C, net.clean.std_C],
        "precision": str(net.autocast),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def read(file: Path, count: int) -> Tensor | None:
    """Kept features, or None when the file is absent, damaged or of another number of images."""
    try:
        tensors = load_tensors(file.read_bytes())
        rows, claimed = tensors["features"], tensors["sha256"]
    except Exception:  # safetensors raises types of its own for damage; whatever it is, extraction follows
        return None
    return rows if torch.equal(claimed, checksum(rows)) and len(rows) == count else None


def write(file: Path, rows: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, save_tensors({"features": rows, "sha256": checksum(rows)}))


def checksum(rows: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(rows.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)
