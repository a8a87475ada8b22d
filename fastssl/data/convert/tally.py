"""Running figures of a conversion, and the manifest that they become."""

import dataclasses
import hashlib
import itertools
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastssl.data.convert.prepare import Run, joined
from fastssl.data.manifest import Manifest, Skipped, Warned
from fastssl.data.sources.account import Account
from fastssl.version import __version__

MAX_LISTED = 10_000  # skipped items named one by one; beyond, they are only counted
MAX_WARNINGS = 100  # kinds of notices kept separate
FAR_BELOW = 1 << 14  # a largest 16-bit value below this wastes two bits or more


@dataclasses.dataclass(slots=True)
class Notices:
    """What was noticed of images that were read, counted by kind."""

    warnings: dict[str, Warned] = dataclasses.field(default_factory=dict)
    deep_count: int = 0
    deep_peak: int = 0

    def add(self, run: Run) -> None:
        """Count a run in."""
        self.deep_count += run.deep_count
        self.deep_peak = max(self.deep_peak, run.deep_peak)
        for key, text in run.warnings:
            self._warn(text, key)

    def _warn(self, text: str, key: str) -> None:
        """Count a notice; those that differ in their numbers alone are one."""
        text = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)\b", "N", text)
        if text not in self.warnings and len(self.warnings) >= MAX_WARNINGS:
            text = "further warnings"
        known = self.warnings.get(text, Warned(text, 0, key))
        self.warnings[text] = known._replace(item_count=known.item_count + 1)

    def all(self, *, stretch: int | None) -> tuple[Warned, ...]:
        """Most frequent first; and before them, what the 16-bit images together show."""
        notices = sorted(self.warnings.values(), key=lambda warned: -warned.item_count)
        if stretch is None and self.deep_count and self.deep_peak < FAR_BELOW:
            top = max(1, (1 << self.deep_peak.bit_length()) - 1)
            text = (
                f"{self.deep_peak} of 65535 is the largest value of all 16-bit images, as 8 bits only "
                f"{self.deep_peak // 257 + 1} levels of 256; --stretch {top} takes {top} for white"
            )
            notices.insert(0, Warned(text, self.deep_count, ""))
        return tuple(notices)


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
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    skipped_count: int = 0
    notices: Notices = dataclasses.field(default_factory=Notices)
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
        self.notices.add(run)
        self.skipped += map(Skipped._make, run.refused[: max(0, MAX_LISTED - len(self.skipped))])

    def mean_C(self) -> tuple[float, ...]:
        """Mean of each channel over all pixels, in [0, 1]."""
        return tuple(total / self.pixels / self.full for total in self.sums_2C[0])

    def std_C(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all pixels (population), in [0, 1]."""
        pairs = zip(*self.sums_2C, strict=True)  # exact integers until the last step: no cancellation
        return tuple(((squares * self.pixels - total**2) ** 0.5) / self.pixels / self.full for total, squares in pairs)


def make_manifest(
    tally: Tally,
    *,
    file_format: str,
    classes: Sequence[str],
    labels_N: np.ndarray,
    options: Mapping[str, Any],
    account: Account,
    shards: int | None = None,
) -> Manifest:
    """The manifest of `tally.count` samples with these labels."""
    assert tally.smallest is not None
    tally.hash.update(labels_N.astype("<i8").tobytes())
    one_size = tally.smallest == tally.largest
    counts = np.bincount(labels_N[labels_N >= 0], minlength=len(classes)).tolist()
    return Manifest(
        format=file_format,
        count=tally.count,
        classes=tuple(classes),
        class_counts=tuple(counts),
        unlabeled=int((labels_N < 0).sum()),
        side_px=tally.smallest[0] if one_size and tally.smallest[0] == tally.smallest[1] else None,
        size_min_px=tally.smallest,
        size_max_px=tally.largest,
        channels=tally.channels,
        mean=tally.mean_C(),
        std=tally.std_C(),
        digest="sha256:" + tally.hash.hexdigest(),
        version=__version__,
        options=options,
        skipped_count=tally.skipped_count,
        skipped=tuple(tally.skipped),
        warnings=tally.notices.all(stretch=options.get("stretch")),
        account=account.to_json(),
        shards=shards,
    )
