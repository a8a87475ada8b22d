"""Installs the wheels of an unpacked gpu-suite.tar.gz without network: eval "$(python3 tools/install_gpu_suite.py)"

They go into a folder of their own, so this Python stays as it is; the command that puts the folder on PYTHONPATH is
printed. What fastssl then still lacks is named.
"""

import importlib.metadata
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS, SITE = ROOT.parent / "wheels", ROOT.parent / "site"


def lacking(site: Path) -> list[str]:
    """The requirements of the base install that neither `site` nor this Python meets."""
    from packaging.requirements import Requirement

    sys.path.insert(0, str(site))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement} ({version or 'absent'})")
    return missing


def main() -> int:
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        print(f"Error: no wheels are in {WHEELS}.\nUnpack an archive of tools/pack_gpu_suite.py.", file=sys.stderr)
        return 2
    if not SITE.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        part = SITE.with_name("site.part")
        subprocess.run([*command, "--upgrade", "--target", str(part), *wheels], check=True, stdout=sys.stderr)
        part.rename(SITE)
    for line in lacking(SITE):
        print(f"fastssl needs {line}", file=sys.stderr)
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
