"""The manifest next to every converted file: what is in it, how it came about, and a digest to tell it by."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastssl.data.limits import MAX_CHANNELS, MAX_SIDE_PX
from fastssl.errors import UserError

_PAIRS = ("size_min_px", "size_max_px")


class Skipped(NamedTuple):
    """An item that could not be read, and why."""

    key: str
    reason: str


class Warned(NamedTuple):
    """One kind of notice about items that were read.

    Attributes:
        text: the notice, its numbers as N.
        item_count: items it is about.
        first: the first of them.
    """

    text: str
    item_count: int
    first: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one data file holds; validated when it is made, from whatever source.

    Attributes:
        count: samples.
        channels: C, 1 to MAX_CHANNELS.
        mean, std: of each channel over all pixels, in [0, 1].
        digest: tells the data apart, see `Tally`.
        classes: class names by label.
        side_px: height and width of all images, 1 to MAX_SIDE_PX; None where they differ.
        size_min_px, size_max_px: smallest and largest (height, width).
        class_counts: samples of each class.
        unlabeled: samples without a class.
        format: "beton" or "webdataset".
        account: what the source held and what was passed over, see `Account`.
        shards: number of .tar files of a webdataset.
        version: of fastssl.
        options: of the conversion.
        warnings: what was noticed of items that were read, most frequent first.
        skipped_count: items that could not be read; `skipped` lists the first of them.

    Raises:
        ValueError: one sentence, when a value is absent or absurd.
    """

    count: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    classes: tuple[str, ...]
    side_px: int | None = None
    size_min_px: tuple[int, int] | None = None
    size_max_px: tuple[int, int] | None = None
    class_counts: tuple[int, ...] = ()
    unlabeled: int = 0
    format: str = ""
    version: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped_count: int = 0
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[Warned, ...] = ()
    account: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shards: int | None = None

    def __post_init__(self) -> None:
        _check_whole("count", self.count, 0, None)
        _check_whole("channels", self.channels, 1, MAX_CHANNELS)
        if self.side_px is not None:
            _check_whole("side_px", self.side_px, 1, MAX_SIDE_PX)
        for name in _PAIRS:
            for value in getattr(self, name) or ():
                _check_whole(name, value, 1, MAX_SIDE_PX)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels or not all(_is_finite(value) for value in values):
                raise ValueError(f"{name} is not {self.channels} finite numbers, one per channel")
        if not all(isinstance(name, str) for name in (self.digest, *self.classes)):
            raise ValueError("digest and classes are not strings")
        if not isinstance(self.options, Mapping) or not isinstance(self.account, Mapping):
            raise ValueError("options or account is not a mapping")

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """From the parsed JSON of `to_json`; keys of other versions are ignored.

        Raises:
            ValueError: one sentence, when a value is absent or absurd.
        """
        if not isinstance(record, Mapping):
            raise ValueError("it is not a JSON object")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in record.items() if key in known}
        try:
            for key in ("mean", "std", "classes", "class_counts"):
                values[key] = tuple(values.get(key, ()))
            for key in _PAIRS:
                height, width = values.get(key) or (None, None)
                values[key] = None if height is None else (height, width)
            values["skipped"] = tuple(Skipped(str(s["key"]), str(s["reason"])) for s in values.get("skipped", ()))
            values["warnings"] = tuple(
                Warned(str(w["text"]), int(w["item_count"]), str(w["first"])) for w in values.get("warnings", ())
            )
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"a value is absent or of the wrong type: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        record: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            record[field.name] = list(value) if isinstance(value, tuple) else value
        record["options"], record["account"] = dict(self.options), dict(self.account)
        record["skipped"] = [entry._asdict() for entry in self.skipped]
        record["warnings"] = [entry._asdict() for entry in self.warnings]
        if self.shards is None:
            del record["shards"]
        return record


def _check_whole(name: str, value: object, least: int, most: int | None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is not a whole number of {bounds}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def manifest_path(out: Path) -> Path:
    """Where the manifest of `out` lies: the same name with .json behind it."""
    return out.with_name(out.name + ".json")


def check_belongs(manifest: Manifest, path: Path, *, count: int, channels: int) -> None:
    """UserError for the manifest of another file, such as an earlier one, next to a file of so many images."""
    if (manifest.count, manifest.channels) != (count, channels):
        raise UserError(
            f"{path} has {count} images of {channels} channels, and its manifest {manifest_path(path).name} says "
            f"{manifest.count} of {manifest.channels}.",
            "Put its own manifest back, or convert it again.",
        )


def read_manifest(out: Path) -> Manifest:
    """The manifest next to a data file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: one sentence, when it is damaged.
    """
    try:
        return Manifest.from_json(json.loads(manifest_path(out).read_text(encoding="utf-8")))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
