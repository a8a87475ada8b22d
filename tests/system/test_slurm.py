"""The SLURM script with shims for SLURM: a signalled job saves, exits and asks to be queued again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import tiny

from fastssl.runs import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHIMS = {
    # runs what follows its options, as one task on this machine
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$SHIM_LOG"; [ "$1" = show ] && echo localhost; exit 0',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
}


@pytest.fixture
def shims(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in SHIMS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **job, "PATH": path, "SHIM_LOG": str(tmp_path / "log"), "PYTHONWARNINGS": "ignore"}


@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill (procps) is not installed")
def test_a_signalled_job_saves_and_is_queued_again(
    shims: dict[str, str], tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    long = {"epochs": 4000, "checkpoint_every_epochs": 4000}
    tree = tiny((tiny_data[0], None), train=long, evaluate={"every_epochs": 0})
    recipe.write_text(yaml.safe_dump(tree))
    command = ["bash", str(ROOT / "tools" / "slurm_requeue.sh"), str(recipe), str(run)]
    process = subprocess.Popen(command, env=shims, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-3000:]
    assert "requeue 17" in Path(shims["SHIM_LOG"]).read_text()
    found = checkpoint.latest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found[2]["step"] == len((run / "metrics.jsonl").read_text().splitlines())
