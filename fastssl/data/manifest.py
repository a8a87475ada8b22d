"""The manifest beside every converted file: what is in it, how it came about, and a digest to tell it by."""

import dataclasses
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastssl import __version__
from fastssl.data.convert.prepare import Run, joined
from fastssl.data.storage import temporary_name

Manifest = dict[str, Any]
MAX_LISTED = 10_000  # skipped items named one by one; beyond, they are only counted


def manifest_path(out: Path) -> Path:
    """Where the manifest of `out` lies: the same name with .json behind it."""
    return out.with_name(out.name + ".json")


@dataclasses.dataclass(slots=True)
class Tally:
    """Running figures of a conversion, in order of storing.

    The digest is the SHA-256 over, for each sample, its size, channels and stored bytes, and at the end all labels.
    """

    channels: int
    full: int  # the largest pixel value, 255 or 65535
    count: int = 0
    pixels: int = 0
    sums_2C: list[list[int]] = dataclasses.field(default_factory=list)  # Python integers: they never overflow
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] = (0, 0)
    sizes: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped_count: int = 0
    hash: Any = dataclasses.field(default_factory=hashlib.sha256)

    def add(self, run: Run) -> None:
        """Count a run in."""
        sums = run.sums_2C.tolist()
        old = self.sums_2C or [[0] * self.channels, [0] * self.channels]
        self.sums_2C = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(old, sums, strict=True)]
        self.pixels += run.pixels
        self.count += len(run.data)
        heads = (struct.pack("<HHH", *size, self.channels) for size in run.sizes)
        for piece in joined(itertools.chain.from_iterable(zip(heads, run.data, strict=True))):
            self.hash.update(piece)
        for height, width in set(run.sizes):
            low = self.smallest or (height, width)
            self.smallest = (min(low[0], height), min(low[1], width))
            self.largest = (max(self.largest[0], height), max(self.largest[1], width))
        self.skipped_count += len(run.refused)
        self.skipped += run.refused[: max(0, MAX_LISTED - len(self.skipped))]

    def mean_C(self) -> list[float]:
        """Mean of each channel over all pixels, in [0, 1]."""
        return [total / self.pixels / self.full for total in self.sums_2C[0]]

    def std_C(self) -> list[float]:
        """Standard deviation of each channel over all pixels (population), in [0, 1]."""
        pairs = zip(*self.sums_2C, strict=True)  # exact integers until the last step: no cancellation
        return [((squares * self.pixels - total**2) ** 0.5) / self.pixels / self.full for total, squares in pairs]


def make_manifest(
    tally: Tally,
    *,
    file_format: str,
    classes: Sequence[str],
    labels_N: np.ndarray,
    options: dict[str, Any],
    **more: Any,
) -> Manifest:
    """The manifest of `tally.count` samples with these labels; `more` adds fields of one format."""
    assert tally.smallest is not None
    tally.hash.update(labels_N.astype("<i8").tobytes())
    one_size = tally.smallest == tally.largest
    counts = np.bincount(labels_N[labels_N >= 0], minlength=len(classes)).tolist()
    return {
        "format": file_format,
        "count": tally.count,
        "classes": list(classes),
        "class_counts": counts,
        "unlabeled": int((labels_N < 0).sum()),
        "side_px": tally.smallest[0] if one_size and tally.smallest[0] == tally.smallest[1] else None,
        "size_min_px": list(tally.smallest),
        "size_max_px": list(tally.largest),
        "channels": tally.channels,
        "mean": tally.mean_C(),
        "std": tally.std_C(),
        "digest": "sha256:" + tally.hash.hexdigest(),
        "version": __version__,
        "options": options,
        "skipped_count": tally.skipped_count,
        "skipped": [{"key": key, "reason": reason} for key, reason in tally.skipped],
        **more,
    }


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write under a temporary name, then rename."""
    temporary = temporary_name(path, "tmp")
    try:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
