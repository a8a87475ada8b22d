"""A machine that is shared: views per second of our loop, lightly's and a plain one, alone and next to busy processes.

python bench/shared.py [RECIPE] [--busy 1 2 4] [--quota 1] [--rounds 3] [--seconds 20]

Every measurement is a process of its own: its first WARMUP steps are not timed, and the busy processes start when they
are over. The loops take turns within each situation, and every situation comes once a round. A busy process spins in
Python and keeps one core. A quota is systemd's or a cgroup's where this user may set one, else `taskset` to as many
cores; the record says which. Ours runs as the recipe says and with views shared among threads (model.batch_norm:
per_view). Writes bench/results/shared.json.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import torch  # noqa: E402
from loops import LOOPS, job_of, note_of  # noqa: E402

from fastssl import build  # noqa: E402
from fastssl.bench.parts import work  # noqa: E402
from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.cli.bench_tables import rendered, table_of  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402
from fastssl.runs.machine import cores  # noqa: E402
from fastssl.training.threads import threads  # noqa: E402

WARMUP = 5
SHARED_VIEWS = "fastssl, views shared"
CHANGES = {"fastssl": ["model.batch_norm=joint"], SHARED_VIEWS: ["model.batch_norm=per_view", "train.parallel=views"]}
NAMES = [*CHANGES, *(name for name in LOOPS if name not in CHANGES)]
BUSY = "while True: pass"
SETTLE_S = 1.0  # until busy processes are up, and then until what came before is over
READY = "ready"
ENDLESS = ["train.epochs=100000"]
CGROUP = Path("/sys/fs/cgroup")


def rate(name: str, recipe: Recipe, *, seconds: float, workers: int) -> dict[str, Any]:
    """Views per second of one loop in this process, and how many threads it computes with."""
    with threads(recipe):
        _, steps = LOOPS[name.partition(",")[0]](recipe, workers)
        for _ in zip(range(WARMUP), steps, strict=False):
            pass
        print(READY, flush=True)
        sys.stdin.readline()
        start = time.perf_counter()
        while time.perf_counter() - start < SETTLE_S:  # uses up what was loaded ahead meanwhile
            next(steps)
        start, images = time.perf_counter(), 0
        for count in steps:
            images += count
            if time.perf_counter() - start > seconds:
                break
        views = len(build.views.table(recipe))
        return {"views_per_s": views * images / (time.perf_counter() - start), "threads": torch.get_num_threads()}


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each keep a core, for a while."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def works(command: list[str]) -> bool:
    """Whether it ends well, and soon: a desktop may ask for a password."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=10).returncode == 0
    return False


@contextlib.contextmanager
def quota(wanted: float | None) -> Iterator[tuple[list[str], str]]:
    """A command's prefix that leaves it so many cores, and what sets the quota; neither without one."""
    if wanted is None:
        yield [], ""
        return
    systemd = ["systemd-run", "--scope", "--quiet", "--no-ask-password", "-p", f"CPUQuota={100 * wanted:.0f}%"]
    if shutil.which("systemd-run") and works([*systemd, "true"]):
        yield systemd, "systemd"
        return
    version_2 = (CGROUP / "cgroup.controllers").exists()
    folder = (CGROUP if version_2 else CGROUP / "cpu") / f"fastssl-shared-{os.getpid()}"
    try:
        folder.mkdir()
        name = "cpu.max" if version_2 else "cpu.cfs_quota_us"
        with open(folder / name, "r+") as file:  # the kernel's, not one of ours
            file.write(f"{1e5 * wanted:.0f}" + " 100000" * version_2)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        allowed = sorted(os.sched_getaffinity(0))[: max(1, round(wanted))]
        yield ["taskset", "-c", ",".join(map(str, allowed))], "taskset"
        return
    try:
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh"], "cgroup"
    finally:
        folder.rmdir()


def in_a_process(
    name: str, recipe: Recipe, prefix: list[str], busy: int, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """`rate` in a fresh process, next to busy ones; None, with a word why, where the loop is missing or fails."""
    job = {"name": name, "recipe": recipe.model_dump(mode="json"), "seconds": arguments.seconds}
    command = [*prefix, sys.executable, __file__, "--one", json.dumps(job | {"workers": arguments.workers})]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == READY:
                break
        with busy_processes(busy):
            time.sleep(SETTLE_S)
            out, _ = process.communicate("\n")
        errors.seek(0)
        if process.returncode:
            print(f"{name} is left out: {(errors.read().strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
            return None
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def situations(arguments: argparse.Namespace) -> list[tuple[str, int, float | None]]:
    """Name, busy processes and quota in cores of each situation; alone comes first."""
    busy = [(f"next to {count} busy", count, None) for count in arguments.busy]
    return [("alone", 0, None), *busy, (f"quota of {arguments.quota:g} cores", 0, arguments.quota)]


def measure(recipe: Recipe, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every loop in every situation, and its share of what it does alone."""
    values: dict[tuple[str, str], list[float]] = {}
    more: dict[tuple[str, str], dict[str, Any]] = {}
    missing = set[str]()
    for _ in range(arguments.rounds):
        for situation, busy, wanted in situations(arguments):
            for name in arguments.loops:
                with quota(wanted) as (prefix, setter):
                    found = (
                        None
                        if name in missing
                        else in_a_process(name, load(recipe, CHANGES.get(name, [])), prefix, busy, arguments)
                    )
                if found is None:
                    missing.add(name)
                    continue
                print(f"{name}, {situation}: {found['views_per_s']:,.0f} views/s", file=sys.stderr)
                values.setdefault((situation, name), []).append(found["views_per_s"])
                by = {"quota_by": setter} if setter else {}
                more[situation, name] = note_of(name, recipe) | {"threads": found["threads"]} | by
    return rows_of(values, more, work(recipe, build.hardware.device(recipe)))


def rows_of(
    values: dict[tuple[str, str], list[float]], more: dict[tuple[str, str], dict[str, Any]], what: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for (situation, name), rates in values.items():
        here = what | {"situation": situation}
        rows.append(row(name, here, "views_per_s", rates, **more[situation, name]))
        if situation != "alone":
            pairs = zip(rates, values["alone", name], strict=False)
            rows.append(row(name, here, "share_of_alone_pct", [100 * one / alone for one, alone in pairs]))
    return rows


def text(made: dict[str, Any]) -> str:
    lines = [
        [
            one["work"]["situation"],
            one["impl"],
            one["metric"],
            *(f"{one[key]:,.1f}" for key in ("median", "min", "max")),
        ]
        for one in made["rows"]
    ]
    return rendered(table_of("A shared machine", ["situation", "loop", "metric", "median", "min", "max"], lines))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "bench" / "peers" / "small.yaml"))
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--loops", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2, 4], help="busy processes next to the loop")
    parser.add_argument("--quota", type=float, default=1.0, help="in cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--workers", type=int, default=cores().count, help="of the peers' DataLoader")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "shared.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.one:
        job = json.loads(arguments.one)
        print(json.dumps(rate(job.pop("name"), load(job.pop("recipe")), **job)))
        return
    recipe = job_of(arguments.recipe, [*ENDLESS, *arguments.changes])
    rows = measure(recipe, arguments)
    if not rows:
        sys.exit("No loop has run.")
    digest = build.data.manifest_of(recipe.data.path).digest
    made = record(
        "shared", rows, recipe.model_dump(mode="json"), data_digest=digest, warmup=f"the first {WARMUP} steps untimed"
    )
    save(arguments.out, made)
    print(text(made))


if __name__ == "__main__":
    main()
