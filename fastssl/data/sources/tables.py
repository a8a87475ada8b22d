"""Sources that are arrays already: the embedded shapes, .npz and .npy, an existing .beton."""

import hashlib

import numpy as np

from .. import shapes
from .base import Indexed, Item


def shapes_source(split: str, *, seed: int, count: int, side_px: int) -> Indexed:
    """`count` embedded shapes; every split is a set of its own, whatever the seed."""
    name = f"shapes/{split}/{seed}".encode()
    set_seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
    labelled = split != "unlabelled"
    labels_N = (
        np.arange(count, dtype=np.int64) % len(shapes.CLASSES) if labelled else np.full(count, -1, np.int64)
    )

    def read(index: int) -> Item:
        images_1HWC, _ = shapes.images(1, side_px, seed=set_seed, start=index)
        return Item(f"shapes[{index}]", images_1HWC[0], int(labels_N[index]))

    return Indexed("shapes", shapes.CLASSES if labelled else (), labels_N, read)
