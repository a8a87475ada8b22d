"""Which tensors of a file are a backbone's: wrappers and prefixes found by the backbone's own names, not by a list.

Choice made: whatever a checkpoint is wrapped in (`state_dict`, `model`, `teacher`) and whatever stands before its names
(`module.`, `backbone.`, `model.encoder_q.`), the right place is where most of the backbone's names are found.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastssl.errors import UserError

_DEPTH = 4  # of mappings within mappings
_PROBES = 16  # names that are tried to find prefixes
_COUNTER = "num_batches_tracked"  # of a batch norm: files from before torch 0.4.1 have none
# Where two places fit equally: a teacher before its student, a query encoder before its slow copy.
_RANKS = ((r"teacher|encoder_q|online|query", 0), (r"student|encoder_k|momentum|target|key", 2))


@dataclass(frozen=True)
class Match:
    """What of a file went into a backbone.

    Attributes:
        origin: what a person calls the file.
        place: keys of the mapping that holds the tensors, and the prefix of their names; "" for the file's own top.
        also: other places that fit as well.
        matched: tensors taken.
        left_over: names in the file that were not taken.
        absent: names of the backbone that the file lacks and that need not be there.
    """

    origin: str
    place: str
    also: tuple[str, ...]
    matched: int
    left_over: tuple[str, ...]
    absent: tuple[str, ...]

    def sentence(self) -> str:
        """One line for a person."""
        place = f" under {self.place}" if self.place else ""
        also = f" (also there: {_some(self.also)})" if self.also else ""
        left = f"{len(self.left_over)} left over ({_some(self.left_over)})" if self.left_over else "none left over"
        absent = f"{len(self.absent)} absent ({_some(self.absent)})" if self.absent else "none absent"
        return f"Weights from {self.origin}: {self.matched} tensors matched{place}{also}, {left}, {absent}."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def match(backbone: nn.Module, loaded: Mapping[str, Any], *, origin: str) -> tuple[dict[str, Tensor], Match]:
    """The backbone's tensors among those of a file, by the backbone's names, and an account of the rest.

    Args:
        backbone: whose names and modules decide.
        loaded: tensors by name, or mappings of such, nested.
        origin: what a person calls the file.

    Raises:
        UserError: when some of the backbone's tensors are not there, or the file has parts that the backbone lacks.
    """
    own = set(backbone.state_dict())
    places = sorted(_places(own, loaded), key=lambda place: place.order)
    if not places:
        names = [name for _, tensors in _mappings(loaded) for name in tensors]
        raise UserError(
            f"{origin} has none of the backbone's tensors: it holds {_some(names) or 'no tensors'}; the backbone's are "
            f"{_some(sorted(own))}.",
            "Set model.backbone to the network that the weights belong to.",
        )
    best = places[0]
    also = tuple(place.name for place in places[1:] if place.count == best.count)
    under = {name.removeprefix(best.prefix): name for name in best.tensors if name.startswith(best.prefix)}
    absent = tuple(sorted(own - set(under)))
    _check_whole([name for name in absent if not name.endswith(_COUNTER)], own, origin)
    left_over = tuple(name for name in best.tensors if name not in {under.get(key) for key in own})
    _check_foreign(backbone, [name for name in under if name not in own], origin)
    chosen = {key: best.tensors[under[key]] for key in own & set(under)}
    return chosen, Match(origin, best.name, also, len(chosen), left_over, absent)


def _check_whole(absent: list[str], own: set[str], origin: str) -> None:
    if absent:
        raise UserError(
            f"{origin} lacks {absent[0]} and {len(absent) - 1} more of the backbone's {len(own)} tensors.",
            "Set model.backbone to the network that the weights belong to.",
        )


def _check_foreign(backbone: nn.Module, names: list[str], origin: str) -> None:
    """UserError for tensors of modules that the backbone lacks within parts that it has: a deeper network's blocks.

    A classifier stands where the backbone has an identity, or at its top; neither is such a part.
    """
    modules = dict(backbone.named_modules())
    parts = {name.partition(".")[0] for name, _ in backbone.named_parameters()}
    foreign = [n for n in names if n.rpartition(".")[0] not in modules and n.partition(".")[0] in parts and "." in n]
    foreign = [name for name in foreign if not _in_identity(name, modules)]
    if foreign:
        raise UserError(
            f"{origin} has {len(foreign)} tensors of parts that the backbone lacks, such as {foreign[0]}.",
            "Set model.backbone to the network that the weights belong to: this one is smaller or another.",
        )


def _in_identity(name: str, modules: Mapping[str, nn.Module]) -> bool:
    words = name.split(".")
    return any(isinstance(modules.get(".".join(words[:i])), nn.Identity) for i in range(1, len(words)))


@dataclass(frozen=True)
class _Place:
    container: str
    prefix: str
    tensors: Mapping[str, Tensor]
    count: int

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.container, self.prefix.rstrip(".")) if part)

    @property
    def order(self) -> tuple[int, int, int, str]:
        """Most names first, then by rank, then the shortest."""
        rank = next((rank for pattern, rank in _RANKS if re.search(pattern, self.name)), 1)
        return -self.count, rank, len(self.name), self.name


def _places(own: set[str], loaded: Mapping[str, Any]) -> Iterator[_Place]:
    """Every mapping and prefix where at least one of the backbone's names is found."""
    names = sorted(own)
    probes = names[:: max(1, len(names) // _PROBES)]
    for container, tensors in _mappings(loaded):
        ends = {name[: -len(probe)] for probe in probes for name in tensors if f".{name}".endswith(f".{probe}")}
        for prefix in ends:
            count = sum(prefix + key in tensors for key in own)
            yield _Place(container, prefix, tensors, count)


def _mappings(
    loaded: Mapping[str, Any], path: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(keys on the way, tensors by name) of every mapping that holds tensors."""
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in loaded.items():
        if isinstance(value, Mapping) and depth:
            yield from _mappings(value, f"{path}/{key}" if path else str(key), depth - 1)


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
