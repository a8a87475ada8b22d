"""An evaluation without labels: what the features of pretraining images look like, as training itself measures it.

N images, V views, F features or embedding dimensions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastssl import build
from fastssl.errors import UserError, option
from fastssl.models import pretrainer
from fastssl.pretrained.evaluation.features import Progress, features, project
from fastssl.pretrained.evaluation.splits import Part, own_file
from fastssl.pretrained.load import Pretrained
from fastssl.probes import table
from fastssl.training.online_probes import INVARIANCE_IMAGES, INVARIANCE_VIEWS, SPECTRUM_IMAGES, views_of


def pretraining_part(net: Pretrained) -> Part:
    """Up to SPECTRUM_IMAGES of the images that the run was pretrained on, those of its own evaluations.

    Raises:
        UserError: when the file is absent, or is a folder of shards.
    """
    data = net.recipe.data
    if data.path.is_dir():
        raise UserError(
            f"{data.path} is a folder of shards, so the pretraining images cannot be picked from it.",
            f"Name labeled images with {option('data')}.",
        )
    own_file(net, "path")
    labels_N = build.data.labels_of(data.path)
    probe_labels_N = build.data.labels_of(data.probe_path) if data.probe_path else labels_N
    rows = build.data.some_of(build.data.sets(net.recipe, labels_N, probe_labels_N).train, SPECTRUM_IMAGES)
    return Part(data.path, rows, labels_N[rows], build.data.manifest_of(data.path))


def figures_by_layer(
    net: Pretrained, part: Part, *, layers: Sequence[str], folder: Path | None, progress: Progress | None
) -> dict[str, dict[str, float]]:
    """Every figure of the table that needs no label, for each layer.

    Args:
        net: whose features.
        part: of which images.
        layers: "backbone", "projector".
        folder: of the cache of features; None keeps nothing.
        progress: called with (file name, images done, images in all).
    """
    clean = features(net, part, views=(1,), layers=layers, folder=folder, progress=progress)
    views = views_by_layer(net, part, layers)
    return {layer: table.figures(clean[1, layer], views_VNF=views[layer]) for layer in layers}


@torch.no_grad()
def views_by_layer(net: Pretrained, part: Part, layers: Sequence[str]) -> dict[str, Tensor]:
    """Features (V, N, F) of the recipe's own views of some of the images."""
    few = part.pick(build.data.some_of(torch.arange(len(part.rows_N)), INVARIANCE_IMAGES))
    augment = replace(net.clean, views=build.views.table(net.recipe)[:INVARIANCE_VIEWS])
    autocast = net.autocast
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for batch in build.data.ordered_loader(net.recipe, few.path, few.rows_N, device=net.device).epoch(0):
        views = [view_BCHW for group in views_of(augment, batch) for view_BCHW in group]
        h_VBF = torch.stack([pretrainer.embed(net.backbone, view, autocast=autocast).float() for view in views])
        for layer in layers:
            rows = h_VBF if layer == "backbone" else torch.stack([project(net, h_BF) for h_BF in h_VBF])
            parts[layer].append(rows)
    return {layer: torch.cat(rows, dim=1) for layer, rows in parts.items()}
