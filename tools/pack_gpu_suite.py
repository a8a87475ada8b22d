"""Packs what `make gpu-suite` needs on a machine without network into one archive.

python tools/pack_gpu_suite.py --images FILE [--out gpu-suite.tar.gz]

The archive holds the committed tree, wheels and images; docs/benchmarks.md says how it is used. The wheels are those
that fastssl and its peers need beyond BARE, at the versions of constraints.txt.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
NAME = "gpu-suite"
LIMIT_BYTES = 64 << 20
# A rented machine has these, and what they need in turn: timm brings PyYAML and safetensors, torchvision brings Pillow
BARE = {
    *("torch", "torchvision", "triton", "numpy", "numba", "timm", "typer", "rich", "pytest"),
    *("llvmlite", "pillow", "pyyaml", "safetensors", "tqdm", "packaging", "pluggy", "iniconfig", "pygments"),
}
UNUSED = {"pytorch-lightning", "hydra-core"}  # of lightly: its trainer and command line, which no loop here calls
ALSO = ["psutil", "pytest-timeout", "lightning-utilities"]  # the last: lightly imports it and names it nowhere
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "extra": "",
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)]  # pip takes each by its exact name


def wanted() -> list[Requirement]:
    """The base install, the peers and what tests on a GPU need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["peers"], *ALSO]
    return [Requirement(line) for line in lines]


def wheelhouse(folder: Path) -> list[str]:
    """Fetch the wheels into `folder`, and those that they need, until nothing beyond BARE is missing; their names."""
    queue, names = wanted(), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if name in {*BARE, *UNUSED, *names}:
            continue
        names.append(name)
        queue += needs(fetch(requirement, folder))
    return sorted(names)


def fetch(requirement: Requirement, folder: Path) -> Path:
    """One wheel for Python 3.12 on Linux, compiled or pure."""
    name = canonicalize_name(requirement.name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += ["--constraint", str(ROOT / "constraints.txt"), f"{requirement.name}{requirement.specifier}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Error: no wheel of {requirement} for Python 3.12.\n{done.stderr.strip().splitlines()[-1]}")
    return next(path for path in folder.glob("*.whl") if parse_wheel_filename(path.name)[0] == name)


def needs(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(path).decode()).get_all("Requires-Dist") or []
    requirements = map(Requirement, lines)
    return [r for r in requirements if r.marker is None or r.marker.evaluate(TARGET)]


def photographs(folder: Path) -> None:
    """The two that scikit-learn ships, from which the stages at 224 px make theirs."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        print("scikit-learn is not installed: stages at 224 px are left out where it is missing too.", file=sys.stderr)
        return
    folder.mkdir(parents=True)
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy(Path(found.origin).parent / "datasets" / "images" / name, folder)


def tree(archive: Path) -> None:
    """The committed files as a tar."""
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    if changed:
        print(f"{len(changed.splitlines())} uncommitted changes are not packed.", file=sys.stderr)
    subprocess.run([*git, "archive", f"--prefix={NAME}/fastssl/", f"--output={archive}", "HEAD"], check=True)


def pack(out: Path, images: Path | None, wheels: Path | None) -> None:
    """Write the archive.

    Args:
        out: the .tar.gz.
        images: an archive with train/ and test/; None for none.
        wheels: a folder of wheels; None to fetch them.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.tar"
        tree(code)
        if wheels is None:
            wheels = Path(folder) / "wheels"
            print("wheels:", ", ".join(wheelhouse(wheels)), file=sys.stderr)
        photographs(Path(folder) / "photographs")
        with tarfile.open(code) as committed, tarfile.open(out, "w:gz") as archive:
            for member in committed:
                archive.addfile(member, committed.extractfile(member) if member.isfile() else None)
            archive.add(wheels, f"{NAME}/wheels")
            if images is not None:
                archive.add(images, f"{NAME}/shared/data/{images.name}")
            if (Path(folder) / "photographs").exists():
                archive.add(Path(folder) / "photographs", f"{NAME}/shared/data/photographs")
    size = out.stat().st_size
    print(f"{out}: {size / 2**20:.1f} MiB")
    if size > LIMIT_BYTES:
        print(f"This is more than the {LIMIT_BYTES >> 20} MiB that many rented machines take.", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="an archive with train/ and test/")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels instead of fetching them")
    parser.add_argument("--out", type=Path, default=Path(f"{NAME}.tar.gz"))
    arguments = parser.parse_args()
    for path in (arguments.images, arguments.wheels):
        if path is not None and not path.exists():
            sys.exit(f"Error: {path} does not exist.\nGive the path of an archive of images, or of a folder of wheels.")
    pack(arguments.out, arguments.images, arguments.wheels)


if __name__ == "__main__":
    main()
