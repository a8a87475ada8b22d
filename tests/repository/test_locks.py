"""The locks: every dependency and extra is pinned, within bounds, once, and torch's stack is of one CUDA."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import lock  # noqa: E402

sys.path.remove(str(ROOT / "tools"))

# what a lock leaves out: lightly is installed without its dependencies, DALI for the other CUDA
LEFT_OUT = {
    "constraints.txt": {"lightly", "nvidia-dali-cuda120"},
    "constraints-cuda12.txt": {"lightly", "nvidia-dali-cuda130"},
}


def pins(name: str) -> dict[str, str]:
    """Versions by name; a line that is not `name==version` fails."""
    found: dict[str, str] = {}
    for line in lock.pins_of(ROOT / name):
        one = Requirement(line)
        (pin,) = one.specifier
        assert pin.operator == "=="
        assert not Version(pin.version).local, "a build label would exclude other builds"
        assert canonicalize_name(one.name) not in found
        found[canonicalize_name(one.name)] = pin.version
    return found


@pytest.mark.parametrize("name", LEFT_OUT)
def test_every_dependency_and_extra_is_pinned_within_its_bounds(name: str) -> None:
    found = pins(name)
    asked = {canonicalize_name(one.name): one for one in lock.direct()}
    assert asked.keys() - found.keys() == LEFT_OUT[name]
    assert not [str(one) for key, one in asked.items() if key in found and not one.specifier.contains(found[key])]


def test_each_lock_has_the_stack_of_one_cuda() -> None:
    thirteen, twelve = pins("constraints.txt"), pins("constraints-cuda12.txt")
    assert not [name for name in thirteen if name.endswith(("-cu12", "cuda120"))]
    assert not [name for name in twelve if name.endswith(("-cu13", "cuda130"))]
    assert thirteen["cuda-bindings"].startswith("13.")
    assert twelve["nvidia-cuda-runtime-cu12"].startswith("12.")
    differs = {name for name in {*thirteen, *twelve} if thirteen.get(name) != twelve.get(name)}
    assert all(lock.CUDA13_STACK.match(f"{name}==") for name in differs)


def test_pins_hold_for_torchs_builds_for_a_cpu() -> None:
    torch = pins("constraints.txt")["torch"]
    assert Requirement(f"torch=={torch}").specifier.contains(f"{torch}+cpu")


def test_pins_install_on_debians_own_python() -> None:
    """Debian 12 has Python 3.11.2; a pin that needs a later 3.11 leaves pip without a solution there."""
    found, refused, seen = pins("constraints.txt"), dict[str, str](), 0
    for there in importlib.metadata.distributions():
        name = canonicalize_name(there.metadata["Name"] or "")
        if found.get(name) == there.version.partition("+")[0]:
            seen += 1
            needed = there.metadata["Requires-Python"] or ""
            if not SpecifierSet(needed).contains("3.11.2"):
                refused[name] = needed
    assert not refused
    assert seen > 50
