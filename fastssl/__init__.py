"""fastssl: pretrain a vision backbone on unlabelled images as fast as the hardware allows.

>>> summary = fastssl.train("recipes/quickstart.yaml")
>>> features = fastssl.load(summary["run_dir"]).embed(images)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastssl.data.convert.convert import convert as convert
    from fastssl.pretrained.load import Pretrained as Pretrained
    from fastssl.pretrained.load import load as load
    from fastssl.recipe import Recipe as Recipe
    from fastssl.training.loop import train as train

# Imported on first use, so that `fastssl --help` does not wait for torch.
_HOMES = {
    "convert": "fastssl.data.convert.convert",
    "Pretrained": "fastssl.pretrained.load",
    "load": "fastssl.pretrained.load",
    "Recipe": "fastssl.recipe",
    "train": "fastssl.training.loop",
}
__all__ = ["Pretrained", "Recipe", "convert", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
