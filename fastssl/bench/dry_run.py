"""What a recipe would do, without writing anything: shapes, steps, sizes and a measured estimate of the time."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastssl import build
from fastssl.models import pretrainer
from fastssl.recipe import progressive
from fastssl.recipe.load import dump
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.training.guards import out_of_memory
from fastssl.training.step import step_of

ESTIMATE_IMAGES = 16


def describe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, the shapes along the data's path, steps, parameters, and an estimate from three real steps.

    The estimate runs random images, uncompiled, in a batch of about ESTIMATE_IMAGES on a CPU and in a whole one on a
    GPU. It leaves out loading; it is a rough guide.
    """
    build.preflight.check(recipe)
    device = build.hardware.device(recipe)
    rows = view_table(recipe.augment)
    channels = build.data.manifest_of(recipe.data.path).channels if recipe.data.path.exists() else 3
    network = build.model.network(recipe, in_channels=channels, device=device)
    images = images_of(recipe)
    whole, rest = divmod(images or 0, recipe.data.batch_size)
    steps = whole + (rest > 0 and not recipe.data.drop_last) if images else None
    seconds, timed = seconds_per_image(recipe, network, channels, device)
    total_s = seconds * recipe.data.batch_size * steps * recipe.train.epochs if steps else None
    features_dim = pretrainer.features_dim(network.backbone, side_px=rows[0].side_px, in_channels=channels)
    projector_s = projector_seconds_per_image(recipe, network, features_dim, device, batch=timed)
    dim = recipe.model.projector[-1] if recipe.model.projector else features_dim
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "device": str(device),
        "precision": build.hardware.precision(recipe),
        "images": images,
        "steps_per_epoch": steps,
        "steps": steps * recipe.train.epochs if steps else None,
        "views": len(rows),
        "view_sides_px": [row.side_px for row in rows],
        "largest_sides_px": progressive.sides_px(recipe.augment, recipe.train.epochs),
        "features_dim": features_dim,
        "embedding_dim": dim,
        "loss_weights": build.losses.weights(recipe, dim),
        "collapse_risk": build.losses.collapse_risk(recipe),
        "idle_color": build.views.idle_color(recipe, channels),
        "idle_settings": build.idle.idle_settings(recipe),
        "backbone_parameters": pretrainer.parameter_count(network.backbone),
        "projector_parameters": pretrainer.parameter_count(network.projector),
        "projector_pct": round(100 * min(1.0, projector_s / seconds), 1),
        "estimated_train_s": round(total_s, 4) if total_s else None,
        "estimate_images": timed,
    }
    return record | {"text": f"{text_of(record, recipe)}\n\n{dump(recipe).rstrip()}"}


def images_of(recipe: Recipe) -> int | None:
    """Images to pretrain on, when the file or the generator knows."""
    if recipe.data.path.exists():
        labels = build.data.labels_of(recipe.data.path)
        probe = build.data.labels_of(recipe.data.probe_path) if recipe.data.probe_path else labels
        return len(build.data.sets(recipe, labels, probe).train)
    return None if recipe.data.count is None else build.data.images_to_train_on(recipe, recipe.data.count)


def images_per_second(recipe: Recipe, channels: int) -> float:
    """Measured here: images per second of the recipe's step, loading and making views apart."""
    device = build.hardware.device(recipe)
    network = build.model.network(recipe, in_channels=channels, device=device)
    return 1 / seconds_per_image(recipe, network, channels, device)[0]


def seconds_per_image(
    recipe: Recipe, network: pretrainer.Pretrainer, channels: int, device: torch.device
) -> tuple[float, int]:
    """Seconds of a step (not loading) for one image's views, and the images of the steps that were timed.

    The fastest of three steps after one unmeasured. On a CPU of a few images; on a GPU, which a few leave idle, of as
    many as in training, or as fit.
    """
    batch = build.model.few_images(recipe, ESTIMATE_IMAGES if device.type == "cpu" else recipe.data.batch_size)
    while True:
        try:
            return seconds_of_step(recipe, network, channels, device, batch=batch) / batch, batch
        except RuntimeError as error:
            smaller = build.model.few_images(recipe, batch // 2)
            if smaller >= batch or not out_of_memory(error):
                raise
            batch = smaller


def seconds_of_step(
    recipe: Recipe, network: pretrainer.Pretrainer, channels: int, device: torch.device, *, batch: int
) -> float:
    rows = view_table(recipe.augment)
    groups = tuple(
        torch.rand(1, batch, row.side_px, row.side_px, channels, device=device).permute(0, 1, 4, 2, 3) for row in rows
    )
    step = step_of(recipe, network, device=device)
    return fastest_s(lambda: step(groups, 0.0)["loss"])


def projector_seconds_per_image(
    recipe: Recipe, network: pretrainer.Pretrainer, features_dim: int, device: torch.device, *, batch: int
) -> float:
    """Of those, the projector's forward and backward pass over the features of one image's views."""
    h_NF = torch.randn(len(view_table(recipe.augment)) * batch, features_dim, device=device, requires_grad=True)
    autocast = build.hardware.autocast(recipe)

    def forward_and_backward() -> Tensor:
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            total: Tensor = network.projector(h_NF).float().square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    return fastest_s(forward_and_backward) / batch if recipe.model.projector else 0.0


def fastest_s(call: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of three calls after one unmeasured, until the number it returns is there."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float(call())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def text_of(record: dict[str, Any], recipe: Recipe) -> str:
    estimate = record["estimated_train_s"]
    lines = {
        "device": record["device"],
        "precision": record["precision"],
        "images": record["images"] if record["images"] else "known once the data is converted",
        "views": f"{record['views']} of {sorted(set(record['view_sides_px']), reverse=True)} px"
        + (f", at first of {record['largest_sides_px'][0]} px" if recipe.augment.progressive else ""),
        "shapes": f"images ({recipe.data.batch_size}, H, W, C) uint8 -> features ({record['views']} x "
        f"{recipe.data.batch_size}, {record['features_dim']}) -> embeddings (..., {record['embedding_dim']})",
        "parameters": f"backbone {record['backbone_parameters']:,}, projector {record['projector_parameters']:,}",
        "projector": f"{record['projector_pct']:g} % of the time of a step (measured here, forward and backward)",
        "loss": loss_text(recipe),
        "loss weights": ", ".join(f"{name} {value:.4g}" for name, value in record["loss_weights"].items()),
        "steps": f"{record['steps']} ({record['steps_per_epoch']} in each of {recipe.train.epochs} epochs)"
        if record["steps"]
        else "known once the data is converted",
        "estimate": f"about {estimate / 60:.0f} min of training (rough: from a batch of {record['estimate_images']})"
        if estimate
        else "known once the data is converted",
    }
    said = [record["collapse_risk"], record["idle_color"], *record["idle_settings"]]
    warnings = [f"{'warning:':15s} {sentence}" for sentence in said if sentence]
    return "\n".join([*(f"{name + ':':15s} {value}" for name, value in lines.items()), *warnings])


def loss_text(recipe: Recipe) -> str:
    row = build.losses.LOSSES[recipe.loss.name]
    return f"{row.label}: {', '.join(row.terms)}"
