"""Rewrites constraints.txt and constraints-cuda12.txt: one version of everything that fastssl and its extras need.

`python tools/lock.py`, in the environment that the tests pass in, writes what is installed there. What an extra needs
and is not installed is left out, since its version would not have been tested. Pins have no build label (torch==2.14.1,
not +cpu), so they hold for torch's CPU wheels and for pip's own, which are built for CUDA 13.

`python tools/lock.py cuda12` then writes the same pins with torch's stack for CUDA 12 in place of that for CUDA 13:
torch 2.10 is the last whose own wheels are built for CUDA 12. It resolves, by `uv pip compile` (pip install uv), and
installs nothing.
"""

import importlib.metadata
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CUDA12 = ("torch==2.10.*", "torchvision==0.25.*", "nvidia-dali-cuda120", "timm")  # timm: asks for torch
CUDA13_STACK = re.compile(r"(torch|torchvision|triton|cuda-.*|nvidia-.*)==")


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, every extra included, and what building needs."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tree["project"]
    lines = [*project["dependencies"], *tree["build-system"]["requires"]]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != canonicalize_name(project["name"])]


def installed(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Versions of what is wanted and all that needs, by name, of the packages installed here."""
    found: dict[str, str] = {}
    queue, seen = list(wanted), set[tuple[str, frozenset[str]]]()
    while queue:
        one = queue.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            there = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = there.version.partition("+")[0]
        for line in there.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                queue.append(need)
    return found


def pins_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def resolved_for_cuda12(pins: list[str]) -> list[str]:
    """The pins, with what torch and DALI need on CUDA 12 for what they need on CUDA 13."""
    kept = [pin for pin in pins if not CUDA13_STACK.match(pin)]
    with tempfile.TemporaryDirectory() as folder:
        bounds, asked = Path(folder, "bounds.txt"), Path(folder, "asked.in")
        bounds.write_text("\n".join(kept))
        asked.write_text("\n".join(CUDA12))
        command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--constraint", str(bounds)]
        system = ["--python-version", platform.python_version(), "--python-platform", "x86_64-manylinux_2_28"]
        made = subprocess.run([*command, *system, str(asked)], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {line.partition("+")[0] for line in made.splitlines() if "==" in line}
    return sorted({*kept, *found}, key=lambda pin: pin.partition("==")[0])


def write(path: Path, header: list[str], pins: list[str]) -> None:
    path.write_text("\n".join([*(f"# {line}" for line in header), *pins]) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(pins)} packages")


def main(words: list[str]) -> None:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    bounds = "upper bounds are not claimed."
    if words == ["cuda12"]:
        header = ["As constraints.txt, with torch's wheels for CUDA 12; resolved by tools/lock.py cuda12;", bounds]
        write(ROOT / "constraints-cuda12.txt", header, resolved_for_cuda12(pins_of(ROOT / "constraints.txt")))
    else:
        # an extra of which some needs are absent or out of bounds was not tested, and could not be installed
        subprocess.run([sys.executable, "-m", "pip", "check"], check=True)
        header = [f"Versions the tests pass with ({system}), made by tools/lock.py;", bounds]
        pins = [f"{name}=={version}" for name, version in sorted(installed(direct()).items())]
        write(ROOT / "constraints.txt", header, pins)


if __name__ == "__main__":
    main(sys.argv[1:])
