"""The archive for a machine without network: packed from this tree, installed and started in a bare folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkout import git
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import pack_gpu_suite

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git archive needs the repository")


def wheel(folder: Path, name: str, *, needs: tuple[str, ...] = ()) -> Path:
    """A pure wheel of one module."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "HERE = __file__\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but what came out of the archive."""
    git("rev-parse", "HEAD")  # git archive packs it
    folder = tmp_path_factory.mktemp("pack")
    (folder / "wheels").mkdir()
    wheel(folder / "wheels", "only_in_the_wheelhouse")
    (folder / "images.tar").write_bytes(b"images")
    command = [sys.executable, str(ROOT / "tools" / "pack_gpu_suite.py"), "--wheels", str(folder / "wheels")]
    out = folder / "gpu-suite.tar.gz"
    subprocess.run([*command, "--images", str(folder / "images.tar"), "--out", str(out)], check=True, timeout=120)
    with tarfile.open(out) as archive:
        # Debian 12's Python 3.11.2 has no filter, 3.12 and later warn without one
        archive.extractall(folder / "machine", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "machine" / "gpu-suite"


def test_the_archive_holds_tree_wheels_images_and_the_commit(machine: Path) -> None:
    assert (machine / "shared" / "data" / "images.tar").read_bytes() == b"images"
    assert [path.name for path in (machine / "wheels").iterdir()] == ["only_in_the_wheelhouse-1.0-py3-none-any.whl"]
    committed = git("ls-files")
    packed = {str(path.relative_to(machine / "fastssl")) for path in (machine / "fastssl").rglob("*") if path.is_file()}
    assert {"bench/gpu_suite.py", "Makefile", "recipes/cifar10_lowdim.yaml"} <= packed <= {*committed.splitlines()}
    code = "from fastssl.runs.environment import commit; print(commit())"
    head = git("rev-parse", "HEAD")
    environment = os.environ | {"PYTHONPATH": str(machine / "fastssl")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=machine, capture_output=True, text=True, check=True)
    assert done.stdout == head


def test_make_installs_without_network_and_needs_no_environment_of_its_own(machine: Path) -> None:
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "PYTHONPATH": "/kept", "PIP_NO_INDEX": "1"}
    command = ["make", "gpu-suite", "FLAGS=--plan"]
    done = subprocess.run(
        command, cwd=machine / "fastssl", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "smoke" in done.stdout
    assert not (machine / "fastssl" / ".venv").exists()
    install = [sys.executable, str(machine / "fastssl" / "tools" / "install_gpu_suite.py")]
    again = subprocess.run(install, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert again.stdout == f"export PYTHONPATH={machine / 'site'}:/kept\n"
    shell = [*install[:1], "-c", "import only_in_the_wheelhouse as w; print(w.HERE)"]
    command = ["bash", "-c", f'eval "{again.stdout.strip()}"; exec "$@"', "bash", *shell]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(machine / "site" / "only_in_the_wheelhouse.py")


def test_install_names_the_fix_where_no_wheels_are(tmp_path: Path) -> None:
    (tmp_path / "fastssl" / "tools").mkdir(parents=True)
    script = tmp_path / "fastssl" / "tools" / "install_gpu_suite.py"
    script.write_text((ROOT / "tools" / "install_gpu_suite.py").read_text())
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert "pack_gpu_suite" in done.stderr


def test_the_wheelhouse_holds_all_that_a_bare_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wheel's needs are followed, for the target's Python and not for this one."""
    needs = {
        "pydantic": ("pydantic-core==2", "typing-extensions; python_version >= '3.12'", "old; python_version < '3.12'"),
        "lightly": ("pytorch-lightning", "torch", "extra-only; extra == 'all'"),
    }

    def fetch(requirement: Requirement, folder: Path) -> Path:
        return wheel(folder, requirement.name.replace("-", "_"), needs=needs.get(requirement.name, ()))

    monkeypatch.setattr(pack_gpu_suite, "fetch", fetch)
    names = set(pack_gpu_suite.wheelhouse(tmp_path / "wheels"))
    assert {"pydantic", "pydantic-core", "typing-extensions", "simplejpeg", "kornia", "lightly", "psutil"} <= names
    assert not names & {"torch", "old", "extra-only", "pytorch-lightning"}
    base = {canonicalize_name(requirement.name) for requirement in pack_gpu_suite.wanted()}
    assert base <= names | pack_gpu_suite.BARE
