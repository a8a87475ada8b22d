"""What travels with every export: how to prepare images, what was measured, and how the weights came about.

C channels, S side of the image in pixels.
"""

from typing import Any

from fastssl.errors import UserError
from fastssl.pretrained.load import Pretrained
from fastssl.pretrained.preparation import preprocessing
from fastssl.probes.table import ACCURACIES, BASELINES, TEST
from fastssl.runs import reading
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
        "accuracy": accuracy(net),
        "license": LICENSE,
        "data": {key: value for key, value in net.manifest.to_json().items() if key in DATA_KEYS},
        "recipe": recipe.model_dump(mode="json"),
        "step": net.step,
        "weights": net.weights,
        "weights_sha256": net.digest,
    }


def accuracy(net: Pretrained) -> dict[str, float]:
    """Accuracies in percent that the run measured of these very weights: on test, else on held-out images."""
    if net.run_dir is None or net.weights != ("ema" if net.recipe.optim.ema else "raw"):
        return {}  # a run with averaged weights measures no others
    try:
        run = reading.read(net.run_dir)
    except UserError:
        return {}
    tested = run.summary if run.summary.get("steps") == net.step else {}
    held_out = next((numbers for numbers in reversed(run.evaluations) if numbers["step"] == net.step), {})
    return {key: value for key, value in tested.items() if is_accuracy(key)} or {
        f"validation_{key}": value for key, value in held_out.items() if is_accuracy(key)
    }


def is_accuracy(key: str) -> bool:
    """Whether a summary's key is one of the table of probes, on test or of a baseline."""
    return any(probe.matches(key.removeprefix(prefix)) for probe in ACCURACIES for prefix in (TEST, *BASELINES))
