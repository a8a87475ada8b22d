"""Everything that needs a GPU, in one command with a budget: python bench/gpu_suite.py --data DATA --budget-min 120

Stages run one after another, the most telling first, each as a process with a limit of its own; each leaves one JSON in
--out as it ends, so a cut-off loses nothing, and the same command goes on from there. What cannot run here is said and
left out. Without a GPU, or with --dry-run, every stage runs to its end at tiny size on embedded images, the Triton
kernels under their interpreter: that checks the code, not the speed. The page is --out/index.html.

DATA: an archive or folder of images with train/ and test/, or cifar10 to download.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from gpu_stages import Setting, Stage, stages  # noqa: E402
from gpu_summary import page, text  # noqa: E402

from fastssl.bench.record import record, save  # noqa: E402
from fastssl.training.guards import EXIT_CODE  # noqa: E402

GRACE_S = 60.0  # for a stage to save itself after SIGTERM


@dataclass
class Outcome:
    """How a stage went: done, failed, stopped (its time was up; it goes on next time), or left out."""

    name: str
    title: str
    state: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""


def run(stage: Stage, setting: Setting, limit_s: float) -> Outcome:
    """One stage as a process of its own, its output in --out/NAME.log; at the limit it is asked to stop."""
    out = setting.out / f"{stage.name}.json"
    words = [sys.executable, *stage.words(replace(setting, limit_min=limit_s / 60), out)]
    shown = " ".join(["python", *(word.replace(f"{ROOT}/", "") for word in words[1:])])
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (stage.dry_environment if setting.dry else {})
    start = time.perf_counter()
    with open(setting.out / f"{stage.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            words, cwd=setting.out, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        state = waited(process, limit_s)
    outcome = Outcome(stage.name, stage.title, state, round(time.perf_counter() - start, 1), command=shown)
    if state != "done":
        outcome.reason = last_words(setting.out / f"{stage.name}.log") or f"exit code {process.returncode}"
    return outcome


def last_words(log: Path) -> str:
    """The last line that says something: frames of tables and boxes do not."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip("│╭╰─╮╯ ") for line in lines]
    return next((line[:300] for line in reversed(said) if line), "")


def waited(process: "subprocess.Popen[bytes]", limit_s: float) -> str:
    """done, failed or stopped; whatever happens here, the process and its children are gone afterwards."""
    try:
        code = process.wait(timeout=limit_s)
        return "done" if code == 0 else "stopped" if code == EXIT_CODE else "failed"
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        return "stopped"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def suite(setting: Setting, *, budget_s: float, only: list[str] | None = None) -> list[Outcome]:
    """All stages within the budget; those done before are kept."""
    setting.out.mkdir(parents=True, exist_ok=True)
    before = earlier(setting)
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    for stage in stages(setting):
        if only and stage.name not in only:
            continue
        left_s = budget_s - (time.perf_counter() - start)
        reason = stage.missing(setting)
        if stage.name in before:
            outcome = before[stage.name]
        elif reason:
            outcome = Outcome(stage.name, stage.title, "left out", reason=reason)
        elif left_s < 60 * stage.least_min:
            outcome = Outcome(stage.name, stage.title, "left out", reason="the budget is spent; repeat the command")
        else:
            print(f"{stage.name}: {stage.title} ({left_s / 60:.0f} min left)", file=sys.stderr, flush=True)
            outcome = run(stage, setting, min(left_s, 60 * stage.most_min))
        outcomes.append(outcome)
        said = f" ({outcome.reason})" if outcome.reason else ""
        print(f"{stage.name}: {outcome.state}, {outcome.seconds:.0f} s{said}", file=sys.stderr, flush=True)
        write_summary(setting, outcomes)
    return outcomes


def earlier(setting: Setting) -> dict[str, Outcome]:
    """Stages that an earlier call has done, of the same size and commit."""
    path = setting.out / "suite.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["dry"] != setting.dry or found["commit"] != record("suite", [])["commit"]:
        return {}
    return {one["name"]: Outcome(**one) for one in found["stages"] if one["state"] == "done"}


def write_summary(setting: Setting, outcomes: list[Outcome]) -> None:
    """suite.json and index.html, after every stage."""
    made = record("gpu_suite", [], dry=setting.dry, stages=[vars(one) for one in outcomes])
    save(setting.out / "suite.json", made)
    (setting.out / "index.html").write_text(page(made, results(setting, outcomes)), encoding="utf-8")


def results(setting: Setting, outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """The records that stages have written."""
    paths = {one.name: setting.out / f"{one.name}.json" for one in outcomes if one.state in ("done", "stopped")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="images with train/ and test/, or cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-suite"))
    parser.add_argument("--budget-min", type=float, default=180.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU; what happens without a GPU")
    parser.add_argument("--only", nargs="+", help="names of stages")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    dry = arguments.dry_run or not torch.cuda.is_available()
    if dry and not arguments.dry_run:
        print("No CUDA device is here: a dry run at tiny size, which measures nothing.", file=sys.stderr)
    source = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    setting = Setting(source=source, out=arguments.out.resolve(), dry=dry)
    outcomes = suite(setting, budget_s=60 * arguments.budget_min, only=arguments.only)
    print(text([vars(one) for one in outcomes]))
    print(f"{arguments.out / 'index.html'}")
    return int(any(one.state == "failed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
