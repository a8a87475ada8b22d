"""Rewrites constraints.txt: the installed version of everything that fastssl and its extras need, as it is here.

Run it in the environment that the tests pass in: `python tools/lock.py`. What an extra needs and is not installed here
is left out, since its version would not have been tested. Pins have no build label (torch==2.14.1, not +cu130), so they
hold for torch's wheels for CPU, CUDA 12 and CUDA 13 alike.
"""

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


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


if __name__ == "__main__":
    path, system = ROOT / "constraints.txt", f"{platform.system()} {platform.machine()}"
    top = f"# Versions the tests pass with (Python {platform.python_version()}, {system}), made by tools/lock.py;"
    pins = [f"{name}=={version}" for name, version in sorted(installed(direct()).items())]
    path.write_text("\n".join([top, "# upper bounds are not claimed.", *pins]) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(pins)} packages")
