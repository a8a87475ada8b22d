"""fastssl: pretrain a vision backbone on unlabeled images as fast as the hardware allows.

>>> summary = fastssl.train("recipes/quickstart.yaml")
>>> features = fastssl.load(summary["run_dir"]).embed(images)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.runs import numba_cache
from fastssl.version import __version__

if TYPE_CHECKING:
    from fastssl.data.convert.convert import convert
    from fastssl.pretrained.load import Pretrained, load
    from fastssl.recipe.schema import Recipe
    from fastssl.recipe.view import View
    from fastssl.training.loop import train
    from fastssl.training.views import views

numba_cache.provide(Path(__file__).parent)  # before anything imports numba

# Imported on first use, so that `fastssl --help` does not wait for torch.
_HOMES = {
    "convert": "fastssl.data.convert.convert",
    "Pretrained": "fastssl.pretrained.load",
    "load": "fastssl.pretrained.load",
    "Recipe": "fastssl.recipe.schema",
    "View": "fastssl.recipe.view",
    "train": "fastssl.training.loop",
    "views": "fastssl.training.views",
}
__all__ = ["Pretrained", "Recipe", "View", "__version__", "convert", "load", "losses", "train", "views"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
    import importlib

    if name == "losses":
        return importlib.import_module("fastssl.losses")
    return getattr(importlib.import_module(_HOMES[name]), name)
