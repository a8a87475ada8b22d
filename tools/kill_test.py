"""Kills a small run at random moments, resumes it, and compares what it ends with to a run that was never stopped.

    python tools/kill_test.py --kills 100 --seed 0 --out runs/kill_test.json

SIGKILL and SIGTERM alternate at random: while the data file is converted, during steps, evaluations and checkpoint
writes, and between them. Whenever the run gets to its end, its weights must be bit-identical to the reference's and
its metrics the same, line by line, but for the seconds in them; then it starts anew. Exit code 1 when anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastssl.runs import checkpoint  # noqa: E402
from fastssl.training.guards import EXIT_CODE  # noqa: E402

TIMES = ("train_s", "images_per_s", "views_per_s", "load_pct", "views_pct")
LIMIT_S = 600.0


def recipe(folder: Path) -> Path:
    """Sixty steps with a checkpoint every two and an evaluation every five, on shapes that the run converts itself."""
    tree = {
        "device": "cpu",
        "data": {"source": "shapes", "path": str(folder / "data" / "shapes.beton"), "side_px": 16, "count": 200},
        "augment": {"side_px": 16, "views": 2},
        "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25, "projector": [16, 16]},
        "train": {"epochs": 12, "log_every_steps": 1, "checkpoint_every_steps": 2},
        "evaluate": {"knn_k": [5]},
    }
    tree["data"] |= {"val_count": 40, "batch_size": 32}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(recipe: Path, run: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fastssl", "train", str(recipe), "--run-dir", str(run), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Final weights, and metrics without their seconds."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return checkpoint.load_weights(run), records


def differences(run: Path, reference: Path) -> list[str]:
    (weights, records), (true_weights, true_records) = outcome(run), outcome(reference)
    found = [name for name, tensor in true_weights.items() if not torch.equal(tensor, weights[name])]
    if records != true_records:
        found.append(f"metrics.jsonl ({len(records)} lines, {len(true_records)} in the reference)")
    return found


def phase(run: Path, data: Path) -> str:
    """What the run is in the middle of, as far as its files tell."""
    if not data.exists():
        return "conversion" if data.parent.exists() and any(data.parent.iterdir()) else "start"
    if list((run / "checkpoints").glob(".step*")):
        return "checkpoint write"
    records = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
    if not records:
        return "start"
    last = json.loads(records.splitlines()[-1]) if records.endswith(b"\n") else {"step": -1}
    return "evaluation" if last.get("event") == "step" and last["step"] % 5 == 0 else "step"


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def hit(process: "subprocess.Popen[bytes]", run: Path, data: Path, dice: random.Random, span_s: float) -> str | None:
    """Sends one signal at a random moment; the phase and the signal, or None when the run ended first."""
    if not data.exists() and dice.random() < 0.5:
        wait_for(lambda: data.parent.exists() and any(data.parent.iterdir()), process)
        time.sleep(dice.uniform(0, 0.05))
    else:
        before = (run / "environment.json").stat().st_mtime_ns if (run / "environment.json").exists() else 0
        wait_for(lambda: began(run, before), process)
        time.sleep(dice.uniform(0, span_s))
    number = dice.choice([signal.SIGKILL, signal.SIGTERM])
    moment = phase(run, data)
    if process.poll() is not None:
        return None
    process.send_signal(number)
    _, printed = process.communicate(timeout=LIMIT_S)
    if process.returncode == 0:
        return None
    if process.returncode not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, EXIT_CODE):
        raise SystemExit(f"exit code {process.returncode} after {number.name}:\n{printed.decode()[-3000:]}")
    return f"{number.name}, {moment}"


def began(run: Path, before: int) -> bool:
    """Whether this process has written its environment.json: its steps begin."""
    path = run / "environment.json"
    return path.exists() and path.stat().st_mtime_ns > before


def torture(kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Counts of signals by kind and phase, of runs that came to their end, and what differed."""
    dice, made = random.Random(seed), recipe(folder)
    data, reference, run = folder / "data" / "shapes.beton", folder / "reference", folder / "run"
    process = start(made, reference)
    wait_for(lambda: began(reference, 0), process)
    begun = time.monotonic()
    _, printed = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        raise SystemExit(f"The reference failed:\n{printed.decode()[-3000:]}")
    span_s = time.monotonic() - begun
    counts: Counter[str] = Counter()
    finished, different = 0, list[str]()
    while counts.total() < kills or run.exists():
        if not run.exists() and dice.random() < 0.3:
            shutil.rmtree(data.parent, ignore_errors=True)
        process = start(made, run)
        found = None
        if counts.total() < kills:
            found = hit(process, run, data, dice, span_s)
        process.communicate(timeout=LIMIT_S)
        if found:
            counts[found] += 1
            say(f"{counts.total()}/{kills} {found}")
        elif process.returncode == 0:
            finished += 1
            different += differences(run, reference)
            say(f"end {finished}: {len(different)} differences so far")
            shutil.rmtree(run)
        if run.exists() and not (run / "recipe.yaml").exists():
            shutil.rmtree(run)  # killed before it wrote anything: nothing to go on from
    return {"kills": dict(sorted(counts.items())), "finished": finished, "differences": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the counts as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = torture(arguments.kills, arguments.seed, Path(folder), lambda text: print(text, file=sys.stderr))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    sys.exit(bool(found["differences"]))


if __name__ == "__main__":
    main()
