"""Cores and memory as a process may use them: faked control groups of both versions, and a real `taskset`."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastssl.runs import machine


class Process:
    """A process that may use every core of a machine of 64."""

    def cpu_affinity(self) -> list[int]:
        return list(range(64))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system without control groups, on a machine of 64 cores with 8 GB free."""
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 64)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    names = ("MemFree", "Buffers", "Cached", "SReclaimable", "Shmem", "Active", "Inactive", "Slab")
    lines = ("MemTotal: 16000000 kB", "MemAvailable: 8000000 kB", *(f"{name}: 100 kB" for name in names))
    write(tmp_path / "proc/meminfo", "".join(f"{line}\n" for line in lines))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_all_cores_and_what_the_system_can_give(root: Path) -> None:
    assert str(machine.cores(root)) == "all of 64 cores"
    assert machine.free_host_bytes(root) == 8_192_000_000


@pytest.mark.parametrize("inside", ["", "system.slice/job.scope/worker"])
def test_version_2_takes_the_least_of_every_group_above(inside: str, root: Path) -> None:
    top = root / "sys/fs/cgroup"
    write(root / "proc/self/cgroup", f"0::/{inside}\n")
    for folder, quota in ((top / inside, "max 100000"), (top, "250000 100000")):
        write(folder / "cpu.max", quota + "\n")
    assert str(machine.cores(root)) == "2 of 64 cores by the cgroup's quota"
    write(top / inside / "memory.max", "max\n")
    write(top / "memory.max", "5000000\n")
    write(top / "memory.current", "4000000\n")
    write(top / "memory.stat", "anon 1000000\ninactive_file 2500000\nactive_file 300000\n")
    assert machine.free_host_bytes(root) == 5000000 - 4000000 + 2500000 + 300000  # files read twice make way too


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("seen", [True, False], ids=["nested", "as a container sees it"])
def test_version_1_has_a_tree_for_each_controller(mount: str, seen: bool, root: Path) -> None:
    """In a container without a namespace, the path is the host's and the mount is the group itself."""
    write(root / "proc/self/cgroup", "9:name=systemd:/x\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    for controller in (mount, "memory"):
        (root / "sys/fs/cgroup" / controller / ("docker/abc" if seen else "")).mkdir(parents=True)
    cpu = root / "sys/fs/cgroup" / mount
    memory = root / "sys/fs/cgroup/memory"
    write(cpu / "cpu.cfs_quota_us", "-1" if seen else "50000")
    write(cpu / "cpu.cfs_period_us", "100000")
    if seen:
        write(cpu / "docker/abc/cpu.cfs_quota_us", "50000")
        write(cpu / "docker/abc/cpu.cfs_period_us", "100000")
    assert machine.cores(root) == machine.Cores(1, 64, "the cgroup's quota"), "half a core is one thread"
    write(memory / "memory.limit_in_bytes", str(2**63 - 4096))
    write(memory / "memory.usage_in_bytes", "700")
    assert machine.free_host_bytes(root) > 10**9
    group = memory / "docker/abc" if seen else memory
    write(group / "memory.limit_in_bytes", "1000")
    write(group / "memory.usage_in_bytes", "700")
    write(group / "memory.stat", "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 7\n")
    assert machine.free_host_bytes(root) == 357


def test_a_quota_above_the_affinity_changes_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    write(root / "sys/fs/cgroup/cpu.max", "9900000 100000\n")
    assert machine.cores(root).count == 64


def test_nonsense_in_the_files_is_no_limit(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    for name in ("cpu.max", "memory.max", "memory.current", "memory.stat"):
        write(root / "sys/fs/cgroup" / name, "?\n")
    assert machine.cores(root).count == 64
    assert machine.free_host_bytes(root) > 10**9


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_a_real_taskset_is_seen_and_recorded_by_a_run() -> None:
    core = psutil.Process().cpu_affinity()[0]
    script = (
        "import torch\n"
        "from fastssl.recipe.load import load\n"
        "from fastssl.training import threads\n"
        "recipe = load({'data': {'path': 'x.beton'}, 'train': {'epochs': 1}})\n"
        "with threads.threads(recipe) as reason:\n"
        "    print(torch.get_num_threads(), reason)\n"
    )
    words = ["taskset", "-c", str(core), sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    total = psutil.cpu_count() or 1
    assert done.stdout.strip() in (f"1 1 thread: 1 of {total} cores by affinity", "1 1 thread: all of 1 core")
