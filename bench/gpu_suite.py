"""Everything that needs a GPU, in one command with a budget: python bench/gpu_suite.py --data DATA --budget-min 30

Stages run one after another, the most telling first, each as a process with a time limit. After every stage, and on
SIGTERM, the results are saved in --out and packed into one archive (--results); the same command continues from either.
A stage that cannot run here is left out and the reason is printed. Without a GPU, or with --dry, every stage runs at
tiny size on embedded images, the Triton kernels under their interpreter: that checks the code, not the speed.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import gpu_results  # noqa: E402
import torch  # noqa: E402
from gpu_stages import Setting, Stage, stages  # noqa: E402
from gpu_summary import page, text  # noqa: E402

from fastssl.bench.record import record, save  # noqa: E402
from fastssl.errors import UserError  # noqa: E402
from fastssl.training.guards import EXIT_CODE, Interrupts  # noqa: E402

IMAGES = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"  # where tools/pack_gpu_suite.py puts them
GRACE_S = 20.0  # for a stage to save itself after SIGTERM; part of the budget
POLL_S = 0.5


@dataclass
class Outcome:
    """How a stage went: done, failed, stopped (out of time; the next call continues it), or left out."""

    name: str
    title: str
    state: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""


class Suite:
    """The stages of one setting within a budget. After each of them everything so far is on disk."""

    def __init__(
        self, setting: Setting, results: Path, *, budget_s: float, only: Sequence[str] = (), interrupts: Interrupts
    ) -> None:
        self.setting, self.results, self.interrupts = setting, results, interrupts
        self.only, self.end = only, time.monotonic() + budget_s
        self.stages = stages(setting)
        self.outcomes: dict[str, Outcome] = {}
        self.packed = ""

    def run(self) -> list[Outcome]:
        """Run every stage that fits and is not done yet; after a signal, save and leave the rest for the next call."""
        self.setting.out.mkdir(parents=True, exist_ok=True)
        if self.results.exists() and not (self.setting.out / "suite.json").exists():
            gpu_results.unpack(self.results, self.setting.out)
            report(f"continuing from {self.results}")
        self.outcomes = earlier_outcomes(self.setting)
        for stage in self.stages:
            if self.only and stage.name not in self.only:
                continue
            before = self.outcomes.get(stage.name)
            done = before is not None and before.state == "done" and stage.holds(self.setting)
            outcome = before if before and done else self.outcome_of(stage)
            self.outcomes[stage.name] = outcome
            reason = f" ({outcome.reason})" if outcome.reason else ""
            report(f"{stage.name}: {outcome.state}, {outcome.seconds:.0f} s{reason}")
            self.save()
        return self.in_order()

    def in_order(self) -> list[Outcome]:
        return [self.outcomes[stage.name] for stage in self.stages if stage.name in self.outcomes]

    def outcome_of(self, stage: Stage) -> Outcome:
        """Run it, or say why not."""
        left_s = self.end - time.monotonic() - GRACE_S
        reason = stage.missing(self.setting)
        if self.interrupts.caught:
            reason = f"{self.interrupts.caught} came first; repeat the command"
        elif not reason and left_s < 60 * stage.least_min:
            reason = f"needs {stage.least_min:g} min and {max(0.0, left_s / 60):.1f} are left; repeat the command"
        if reason:
            return Outcome(stage.name, stage.title, "left out", reason=reason)
        report(f"{stage.name}: {stage.title} ({left_s / 60:.0f} min left)")
        limit_s = left_s if self.setting.dry else min(left_s, 60 * stage.most_min)
        return run(stage, self.setting, limit_s, self.interrupts)

    def save(self) -> None:
        """suite.json, index.html and the archive, each whole or not at all."""
        outcomes = self.in_order()
        suite = record("gpu_suite", [], dry=self.setting.dry, stages=[vars(outcome) for outcome in outcomes])
        save(self.setting.out / "suite.json", suite)
        html = page(suite, records(self.setting, outcomes))
        (self.setting.out / "index.html").write_text(html, encoding="utf-8")
        self.packed = gpu_results.pack(self.setting.out, self.results)


def run(stage: Stage, setting: Setting, limit_s: float, interrupts: Interrupts) -> Outcome:
    """One stage as a process, its output in --out/NAME.log; at the limit, or after a signal, it is asked to stop."""
    log = setting.out / f"{stage.name}.log"
    out = setting.out / f"{stage.name}.json"
    words = [sys.executable, *stage.words(replace(setting, limit_min=limit_s / 60), out)]
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            words,
            cwd=setting.out,
            env=environment(stage, dry=setting.dry),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        state = wait_for(process, limit_s, interrupts)
    seconds = time.monotonic() - start
    reason = {
        "done": "",
        "failed": last_line(log) or f"exit code {process.returncode}",
        "stopped": f"{interrupts.caught or 'its limit'} came after {seconds / 60:.1f} min; repeat the command",
    }[state]
    command = " ".join(["python", *(word.replace(f"{ROOT}/", "") for word in words[1:])])
    return Outcome(stage.name, stage.title, state, round(seconds, 1), reason, command)


def environment(stage: Stage, *, dry: bool) -> dict[str, str]:
    """This process's own, with this tree first on PYTHONPATH."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (stage.dry_environment if dry else {})


def last_line(log: Path) -> str:
    """The last line with words in it: the frames of tables and boxes have none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip("│╭╰─╮╯ ") for line in lines]
    return next((line[:300] for line in reversed(lines) if line), "")


def wait_for(process: "subprocess.Popen[bytes]", limit_s: float, interrupts: Interrupts) -> str:
    """done, failed or stopped; whatever happens here, the process and its children are gone afterwards."""
    end = time.monotonic() + limit_s
    try:
        while process.poll() is None and not interrupts.caught and (left_s := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(left_s, POLL_S))
        if process.poll() is not None:
            return {0: "done", EXIT_CODE: "stopped"}.get(process.returncode, "failed")
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        return "stopped"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def earlier_outcomes(setting: Setting) -> dict[str, Outcome]:
    """Of an earlier call of the same size and commit, by the stage's name."""
    path = setting.out / "suite.json"
    if not path.exists():
        return {}
    suite = json.loads(path.read_text(encoding="utf-8"))
    if suite["dry"] != setting.dry or suite["commit"] != record("gpu_suite", [])["commit"]:
        report(f"the results in {setting.out} are of another commit or size and are measured again")
        return {}
    return {outcome["name"]: Outcome(**outcome) for outcome in suite["stages"]}


def records(setting: Setting, outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """What stages have written, the finished ones and those that were stopped."""
    paths = {o.name: setting.out / f"{o.name}.json" for o in outcomes if o.state in ("done", "stopped")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = str(IMAGES) if IMAGES.exists() else "cifar10"
    parser.add_argument("--data", default=there, help="images with train/ and test/, or cifar10 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-suite"))
    parser.add_argument("--results", type=Path, help="read when it is there, always written (default: OUT.tar.gz)")
    parser.add_argument("--budget-min", type=float, default=30.0)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU; what happens without a GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="names of stages; see --plan")
    parser.add_argument("--plan", action="store_true", help="print the stages with their minutes and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    dry = arguments.dry or not torch.cuda.is_available()
    source = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    setting = Setting(source=source, out=arguments.out.resolve(), dry=dry)
    names = [stage.name for stage in stages(setting)]
    if unknown := sorted(set(arguments.only) - set(names)):
        print(f"Error: --only names no stage: {', '.join(unknown)}.\nChoose from {', '.join(names)}.", file=sys.stderr)
        return 2
    if arguments.plan:
        for stage in stages(setting):
            print(f"{stage.name:18} {stage.least_min:5g} to {stage.most_min:3g} min  {stage.title}")
        return 0
    if dry and not arguments.dry:
        report("No CUDA device is here: a dry run at tiny size, which measures nothing.")
    results = (arguments.results or setting.out.with_name(f"{setting.out.name}.tar.gz")).resolve()
    with Interrupts() as interrupts:
        budget_s = 60 * arguments.budget_min
        suite = Suite(setting, results, budget_s=budget_s, only=arguments.only, interrupts=interrupts)
        try:
            outcomes = suite.run()
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    print(text([vars(outcome) for outcome in outcomes]))
    print(suite.packed)
    return EXIT_CODE if interrupts.caught else int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
