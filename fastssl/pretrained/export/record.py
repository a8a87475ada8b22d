"""What travels with every export: how to prepare images, what was measured, and how the weights came about.

C channels, S side of the image in pixels.
"""

import json
from pathlib import Path
from typing import Any

from fastssl.pretrained.load import Pretrained
from fastssl.pretrained.preparation import preprocessing
from fastssl.probes.table import ACCURACIES, BASELINES, TEST
from fastssl.version import __version__

LICENSE = (
    "fastssl is under the MIT license. The weights were learned from the images named under data: whoever passes them "
    "on chooses a license that those images' own terms allow."
)
DATA_KEYS = ("channels", "mean", "std", "side_px", "digest", "count", "classes", "options")


def record_of(net: Pretrained) -> dict[str, Any]:
    """The record of a backbone, plain JSON values."""
    recipe = net.recipe
    return {
        "format": "fastssl-export-1",
        "fastssl": __version__,
        "name": recipe.name,
        "backbone": recipe.model.backbone,
        "features_dim": net.features_dim,
        "preprocessing": preprocessing(
            net.manifest, side_px=net.clean.views[0].side_px, mean=list(net.clean.mean_C), std=list(net.clean.std_C)
        ),
        "accuracy": accuracy(net.run_dir),
        "license": LICENSE,
        "data": {key: value for key, value in net.manifest.to_json().items() if key in DATA_KEYS},
        "recipe": recipe.model_dump(mode="json"),
        "step": net.step,
        "weights": net.weights,
        "weights_sha256": net.digest,
    }


def accuracy(run_dir: Path | None) -> dict[str, float]:
    """Accuracies in percent that the run's summary holds: on test, else the last ones on held-out images."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) if run_dir else {}
    except (OSError, ValueError):
        return {}
    held_out = {f"validation_{key}": value for key, value in summary.get("validation", {}).items()}
    tested = {key: value for key, value in summary.items() if is_accuracy(key)}
    return tested or {key: value for key, value in held_out.items() if is_accuracy(key.removeprefix("validation_"))}


def is_accuracy(key: str) -> bool:
    """Whether a summary's key is one of the table of probes, on test or of a baseline."""
    return any(probe.matches(key.removeprefix(prefix)) for probe in ACCURACIES for prefix in (TEST, *BASELINES))
