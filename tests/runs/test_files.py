"""Files are replaced whole: real processes are killed after every call, disks are full, and the umask is respected."""

import ast
import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastssl
from fastssl.runs import files

SCRIPT = Path(__file__).with_name("killed_writes.py")
KINDS = (
    *("run_files", "failure", "record", "sweep", "features", "embedding"),
    *("checkpoint", "beton", "shards", "schema"),
)
# What may open a file for writing by itself, because it appends, or writes under a name that `runs/files.py` gave it.
WRITERS = {
    "runs/files.py",
    "runs/directory.py",  # metrics.jsonl: appended, and cut to a checkpoint's length
    "pretrained/evaluation/evaluate.py",  # evaluations.jsonl: appended
    "data/convert/shards.py",
    "data/beton/writer.py",
    "pretrained/embedding/table.py",
    "pretrained/export/graphs.py",
    "pretrained/export/huggingface.py",
    "runs/checkpoint.py",
    "runs/tensors.py",  # of a checkpoint, under its hidden name
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL and renameat2")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    words = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_after_any_call_leaves_the_old_or_the_new_file(kind: str, killed: dict[str, dict[str, Any]]) -> None:
    found = killed[kind]
    assert found["changed"], "the two versions must differ for this test to see anything"
    assert found["kills"] >= 4
    assert found["wrong"] == []
    assert found["new"]
    assert found["hidden"] == [], "what killed processes left is removed by the next one"


def writes_in(path: Path) -> bool:
    """Whether a module opens a file for writing, or renames one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        opens = called.endswith("open") and any(re.fullmatch("[rbt]*[wxa+][bt+]*", str(word)) for word in words)
        renames = called in ("os.replace", "os.rename", "tempfile.mkstemp", "tempfile.NamedTemporaryFile")
        if opens or renames or called.endswith((".write_text", ".write_bytes")):
            return True
    return False


def test_nothing_else_in_the_package_replaces_files() -> None:
    package = Path(fastssl.__file__).parent
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if writes_in(path)}
    assert found == WRITERS


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with files.atomic_path(tmp_path / "a") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as mkstemp makes them
        with files.atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            os.close(os.open(temporary / "b", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder" / "b").stat().st_mode) == mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_an_error_leaves_the_old_file_and_nothing_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.atomic_write(tmp_path / "a.json", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write(tmp_path / "a.json", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_file_system_without_fsync_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    files.atomic_write(tmp_path / "a.txt", "ä")
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()


def test_a_folder_is_replaced_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    for text in ("old", "new"):
        with files.atomic_path(tmp_path / "x") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["x", "x/new"]


@linux
def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = files.temporary_name(tmp_path / "a.json")
    left = living.with_name(living.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    other = left.with_name(left.name.replace("a.json", "b.json"))
    for path in (living, left, other):
        path.touch()
    files.atomic_write(tmp_path / "a.json", "1")
    assert sorted(tmp_path.iterdir()) == sorted([living, other, tmp_path / "a.json"])
