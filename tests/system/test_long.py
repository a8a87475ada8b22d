"""Twelve hundred steps, with checkpoints and evaluations: memory, threads and open files stay as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import gc, json, sys
import psutil
import fastssl

process, seen = psutil.Process(), []

def look(record):
    if record["event"] == "step" and record["step"] % 300 == 0:
        gc.collect()
        usage = {"rss": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}
        seen.append({"step": record["step"], **usage})

data = {"path": sys.argv[1], "val_count": 40, "batch_size": 8}
recipe = {
    "device": "cpu",
    "data": data,
    "augment": {"side_px": 8, "views": 2},
    "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.125, "projector": [8]},
    "train": {"epochs": 60, "precision": "fp32", "log_every_steps": 50, "checkpoint_every_epochs": 15},
    "evaluate": {"every_epochs": 15, "knn_k": [5], "linear_epochs": 0},
}
fastssl.train(recipe, run_dir=sys.argv[2], observe=look)
print(json.dumps(seen))
"""


def test_twelve_hundred_steps_take_no_more_than_the_first_half(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tiny_data[0]), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [s["step"] for s in seen] == list(range(300, 1201, 300))
    early, late = seen[1], seen[-1]
    assert late["threads"] <= early["threads"]
    assert late["files"] <= early["files"]
    assert late["rss"] - early["rss"] < 4 << 20, seen  # 600 steps: less than 7,000 bytes a step
