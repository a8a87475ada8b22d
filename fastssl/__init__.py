"""fastssl: pretrain a vision backbone on unlabeled images as fast as the hardware allows.

>>> summary = fastssl.train("recipes/quickstart.yaml")
>>> features = fastssl.load(summary["run_dir"]).embed(images)
"""

from typing import TYPE_CHECKING, Any

from fastssl.version import __version__

if TYPE_CHECKING:
    from fastssl.data.convert.convert import convert
    from fastssl.pretrained.load import Pretrained, load
    from fastssl.recipe.schema import Recipe
    from fastssl.training.loop import train

# Imported on first use, so that `fastssl --help` does not wait for torch.
_HOMES = {
    "convert": "fastssl.data.convert.convert",
    "Pretrained": "fastssl.pretrained.load",
    "load": "fastssl.pretrained.load",
    "Recipe": "fastssl.recipe.schema",
    "train": "fastssl.training.loop",
}
__all__ = ["Pretrained", "Recipe", "__version__", "convert", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
