"""The CUDA kernels compiled for real, for GPUs that are not here, by the oldest Triton that torch allows and this one.

Triton's interpreter takes what a compiler refuses, and one version what another refuses. `tools/cuda_kernels.py`
compiles exactly what a launch would; each version runs it in a process of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import triton
from filelock import FileLock

from fastssl.augment.cuda.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = dict.fromkeys(("3.6.0", triton.__version__))  # torch 2.10's, and that of the torch that is installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter stands in for the compiler"),
]


def installed_beside(version: str) -> Path | None:
    """The folder of that Triton, installed once; None for the one that is installed here."""
    if version == triton.__version__:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastssl-tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"triton-{version}"
    with FileLock(f"{folder}.lock"):
        return install(version, folder)


def install(version: str, folder: Path) -> Path:
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of an interrupted call
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--target",
            str(part),
            f"triton=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            shutil.rmtree(part, ignore_errors=True)
            pytest.skip(f"Triton {version} cannot be installed: {done.stderr.strip().splitlines()[-1][:200]}")
        part.rename(folder)
    return folder


@pytest.fixture(scope="module", params=VERSIONS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tools/cuda_kernels.py` finds with that version of Triton."""
    folder = installed_beside(request.param)
    paths = [str(path) for path in (folder, ROOT) if path is not None]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "tools" / "cuda_kernels.py"), "--cases", "few"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["triton"] == request.param
    return found


def test_kernels_keep_within_their_resources(compiled: dict[str, Any]):
    assert {one["kernel"] for one in compiled["kernels"]} == {"params", "crop", "rotate", "color", "blur"}
    for one in compiled["kernels"]:
        assert one["local"] <= 60, one
        assert one["shared_bytes"] <= 48 << 10, one  # what a program gets without asking
        assert one["lanes_in_a_row"] >= 8, one  # of 8 lanes each takes several pixels
        assert one["mma"] or one["kernel"] not in ("crop", "blur"), one


def test_a_batch_is_few_launches(compiled: dict[str, Any]):
    assert compiled["launches"]["32"] == ["params", "crop"]
    groups = 2  # whose scratch fits the cache
    assert compiled["launches"]["224"] == ["params", *["crop", "rotate", "color", "blur"] * groups]  # of torch none


def test_a_second_call_and_odd_batches_and_groups_compile_nothing_more(compiled: dict[str, Any]):
    assert compiled["added"] == {"32": 0, "224": 0}


KEYS = """
import sys
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastssl"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    from fastssl.augment.cuda import params, passes
    assert passes.__file__.startswith(folder)
    print(passes.run_pass.cache_key + params._sample.cache_key)
"""


def changed_copy(folder: Path, file: str, text: str, other: str) -> Path:
    """The folder with a copy of the package where `other` stands for `text`."""
    shutil.copytree(ROOT / "fastssl", folder / "fastssl", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "fastssl" / "augment" / file
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, other))
    return folder


def test_a_kernel_on_disk_is_not_taken_for_another(tmp_path: Path):
    """Its key must change with every number it was compiled with, wherever that stands."""
    factors = "    BRIGHTNESS = auto()  # factor [1]\n", "    CONTRAST = auto()  # factor [1]\n"
    changes = {
        "nothing": ("cuda/plan.py", "ROTATE = 1", "ROTATE = 1"),
        "columns": ("policy.py", "".join(factors), "".join(reversed(factors))),
        "weights": ("cuda/plan.py", "BILINEAR = 0\n    BICUBIC = 1", "BILINEAR = 1\n    BICUBIC = 0"),
        "passes": ("cuda/plan.py", "ROTATE = 1\n    COLOR = 2", "ROTATE = 2\n    COLOR = 1"),
    }
    folders = [str(changed_copy(tmp_path / name, *change)) for name, change in changes.items()]
    keys = subprocess.run([sys.executable, "-c", KEYS, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert keys.returncode == 0, keys.stderr[-2000:]
    assert len(set(keys.stdout.split())) == len(changes)


def test_kernels_read_fields_of_the_plan_alone():
    """A property's text is not in the key of a compiled kernel, a field's value is."""
    sources = [path.read_text() for path in (ROOT / "fastssl" / "augment" / "cuda").glob("*.py")]
    read = {name for text in sources for name in re.findall(r"\bP\.(\w+)", text)}
    assert read
    assert read <= {field.name for field in fields(Plan)}
