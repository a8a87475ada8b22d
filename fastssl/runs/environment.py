"""The machine and the versions that a result was measured with."""

import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastssl.runs.machine import cores

PACKAGES = ("torch", "torchvision", "numpy", "numba", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton")


def environment() -> dict[str, Any]:
    """Date (UTC), hardware, versions, commit and command, as JSON values."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "fastssl")  # what python -m fastssl is called
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([program, *sys.argv[1:]]),
    }


def hardware() -> dict[str, Any]:
    import torch  # here: what only reads runs does not wait for it

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {"cpu": cpu_name(), "cores": cores().count, "torch_threads": torch.get_num_threads(), "gpus": gpus}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "fastssl-vision": "", "system": platform.platform()}
    for name in ("fastssl-vision", *PACKAGES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed.pop(name, None)
    return installed


@functools.cache  # of the code that this process has imported, whatever is committed meanwhile
def commit() -> str | None:
    """The repository's commit when the package runs from one, with + when files differ from it; else git archive's."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return archived_commit(root / ".git_archival.txt")
    try:
        name, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return name.strip() + ("+" if changes.strip() else "")


def archived_commit(path: Path) -> str | None:
    """What `git archive` has filled in, as .gitattributes asks."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    commit = text.removeprefix("node: ").strip()
    return commit if commit and "$" not in commit else None
