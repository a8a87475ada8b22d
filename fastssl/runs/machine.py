"""What this process may use of its machine: cores by affinity and quota, memory by what is free and by its limit.

A container's quota is a control group's: version 2 has one tree under /sys/fs/cgroup, version 1 one for each
controller. Every group above this process's own limits it as well, as far up as it can see.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")


@dataclass(frozen=True)
class Cores:
    """How many cores a process may use, of how many there are, and what limits it: "", "affinity", or a quota."""

    count: int
    total: int
    limit: str

    def __str__(self) -> str:
        total = f"{self.total} core" + "s" * (self.total > 1)
        return f"{self.count} of {total} by {self.limit}" if self.limit else f"all of {total}"


def cores(root: Path = ROOT) -> Cores:
    """Cores this process may use: its affinity, or its control group's quota where that is less, at least 1.

    Args:
        root: of the file system to read the quota from.
    """
    total = psutil.cpu_count() or 1
    with_affinity = hasattr(psutil.Process, "cpu_affinity")  # not on macOS
    allowed = len(psutil.Process().cpu_affinity()) if with_affinity else total
    quota = min(quotas(root), default=float(allowed))
    if quota < allowed:  # rounded down: threads above a quota stop each other at every barrier
        return Cores(max(1, int(quota)), total, "the cgroup's quota")
    return Cores(allowed, total, "affinity" if allowed < total else "")


def free_host_bytes(root: Path = ROOT) -> int:
    """Memory this process may still take: what the system can give, or what its control groups leave if less.

    Args:
        root: of the file system to read the limits from.
    """
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *left_bytes(root)]))


def quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each control group above this process may take; those without a quota give none."""
    for group in groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # "max" is a ValueError, version 1 writes -1
                yield float(quota) / float(period)


def left_bytes(root: Path) -> Iterator[int]:
    """What each control group above this process still allows. Cached files count as used there, but make way."""
    for group in groups(root, "memory"):
        version_2 = (group / "memory.max").exists()
        limit, used = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
        cached = [name if version_2 else f"total_{name}" for name in ("inactive_file", "active_file")]
        with contextlib.suppress(OSError, ValueError):
            left = int((group / f"memory.{limit}").read_text()) - int((group / f"memory.{used}").read_text())
            yield left + sum(statistic(group / "memory.stat", name) for name in cached)


def statistic(path: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, for one controller, where there are any."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or controller in controllers.split(","):
                top = root / "sys/fs/cgroup"
                if number != "0":
                    top /= controllers if (top / controllers).is_dir() else controller
                # a container may see its own group as the top, under a path that only its host knows
                inside = (top / path.strip("/"), *(top / path.strip("/")).parents)
                yield from (folder for folder in inside if folder.is_relative_to(top) and folder.is_dir())
