"""Augmentation compared with peers, on the same images and with the same policy: python bench/augment.py [--quick]

Each implementation has a process of its own, all take one case after the other: views per second and processor time of
a view, median of n windows after an untimed warm-up. Images lie decoded in memory: CIFAR-10's of 32 px for views of
32 px (the embedded shapes where its archive is absent), photographs of 256x340 px for larger ones. The policy and what
each peer lacks are in augment_peers.py and in the record. Writes bench/results/augment.json.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from augment_peers import BLUR_P, CHAIN, MEAN, PEERS, STD, Case, Peer, Step  # noqa: E402
from convert import CIFAR, make_photographs, unpack_train  # noqa: E402

from fastssl.bench.record import row, write  # noqa: E402

STEP_PX = 2**14  # a CPU's step is this many pixels along the views' sides laid end to end, a GPU's eight times as many
POOL = {"cifar10": 4096, "shapes": 4096, "photographs": 384}
PACKAGES = ("torchvision", "kornia", "pillow", "opencv-python", "rich")


def images(name: str, count: int, folder: Path) -> Path:
    """Decoded images as one .npy of uint8 (count, H, W, 3)."""
    from PIL import Image

    path = folder / f"{name}.npy"
    if name == "shapes":
        from fastssl.data.sources import shapes

        np.save(path, shapes.images(count, 32, seed=0)[0])
        return path
    jpegs = folder / name
    unpack_train(jpegs, count) if name == "cifar10" else make_photographs(jpegs, count)
    np.save(path, np.stack([np.asarray(Image.open(jpeg)) for jpeg in sorted(jpegs.rglob("*.jpg"))]))
    return path


def measure(name: str, case: Case, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Each metric in each window; the warm-up takes half of the time and at least two steps."""
    torch.set_num_threads(case.threads)
    with closing(PEERS[name].steps(case)) as steps:  # type: ignore[type-var]
        next(steps)
        window(steps, case.device, seconds / 2)
        windows = [window(steps, case.device, seconds / repeats) for _ in range(repeats)]
    return {metric: [one[metric] for one in windows] for metric in windows[0]}


def window(steps: Iterator[Step], device: str, seconds: float) -> dict[str, float]:
    """Views per second, and processor time of a view, over at least one step and the time given."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start, cpu_start, made, passed = time.perf_counter(), cpu_seconds(), 0, 0.0
    while not made or passed < seconds:
        count, views = next(steps)
        made += count
        del views  # else two steps' views are in memory at once
        if time.perf_counter() - start >= seconds:
            wait()
        passed = time.perf_counter() - start
    return {"views_per_s": made / passed, "cpu_us_per_view": 1e6 * (cpu_seconds() - cpu_start) / made}


def cpu_seconds() -> float:
    """Processor time of this process, all its threads, and its workers: what a busy machine distorts least."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(one.user + one.system for one in times)


class Bench:
    """One process for each peer, kept from case to case; a peer that is missing or breaks is left out, with a word."""

    def __init__(self, names: list[str], repeats: int, seconds: float) -> None:
        options = {"mp_context": multiprocessing.get_context("spawn"), "initializer": ignore_interrupts}
        self.processes = {name: ProcessPoolExecutor(1, **options) for name in names}
        self.repeats, self.seconds = repeats, seconds

    def measured(self, name: str, case: Case) -> dict[str, list[float]] | None:
        if name not in self.processes:
            return None
        try:
            return self.processes[name].submit(measure, name, case, self.repeats, self.seconds).result()
        except (ImportError, BrokenProcessPool) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            self.processes.pop(name).shutdown(cancel_futures=True)
        except Exception as error:  # a peer's own failure in one case must not cost the others theirs
            print(f"{name} failed: {work(PEERS[name], case, '')}: {error!r}"[:2000], file=sys.stderr)
        return None

    def close(self) -> None:
        for process in self.processes.values():
            process.shutdown()


def ignore_interrupts() -> None:
    """An interrupt is for the parent, which keeps what was measured."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def work(peer: Peer, case: Case, source: str) -> dict[str, Any]:
    made = {"side_px": case.side_px, "views": case.views, "blur": case.blur, "images": source, "batch": case.batch}
    made |= {"threads": case.threads, "device": case.device}
    return made | ({"note": peer.note} if peer.note else {})


def table(rows: list[dict[str, Any]]) -> None:
    """One table for each device, side and blur: a line per implementation, a column per number of views."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    keys = ("device", "side_px", "blur")
    rows = [one for one in rows if one["metric"] == "views_per_s"]
    for key in sorted({tuple(one["work"][k] for k in keys) for one in rows}):
        chosen = [one for one in rows if tuple(one["work"][k] for k in keys) == key]
        views = sorted({one["work"]["views"] for one in chosen})
        title = f"{key[1]} px, {'with' if key[2] else 'without'} blur, {key[0]}, {chosen[0]['work']['threads']} threads"
        shown = Table(title=f"{title}: views/s, median \\[min, max]")
        shown.add_column("")
        for count in views:
            shown.add_column(f"V = {count}", justify="right")
        for name in dict.fromkeys(one["impl"] for one in chosen):
            cells = {one["work"]["views"]: one for one in chosen if one["impl"] == name}
            shown.add_row(name, *(cell(cells[count]) if count in cells else "" for count in views))
        console.print(shown)


def cell(one: dict[str, Any]) -> str:
    return f"{one['median']:,.0f} \\[{one['min']:,.0f}, {one['max']:,.0f}]"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 96, 224])
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--blur", action=argparse.BooleanOptionalAction, help="only with, only without; both if absent")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, after half of that untimed")
    parser.add_argument("--repeats", type=int, default=5, help="windows that the seconds are divided into")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not hold yet")
    parser.add_argument("--quick", action="store_true", help="small steps, V = 2, and nothing written without --out")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.views, arguments.seconds = [2], min(arguments.seconds, 0.1)
    elif arguments.out is None:
        arguments.out = ROOT / "bench" / "results" / "augment.json"
    return arguments


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Case]]:
    """(name of the images, case), those of one side and blur side by side."""
    small = "cifar10" if CIFAR.exists() else "shapes"
    sources = {side_px: small if side_px <= 32 else "photographs" for side_px in arguments.sides}
    shrink = 16 if arguments.quick else 1
    paths = {name: images(name, POOL[name] // shrink, folder) for name in set(sources.values())}
    blurs = (False, True) if arguments.blur is None else (arguments.blur,)
    for device in arguments.devices:
        step_px = STEP_PX * (8 if device == "cuda" else 1) // shrink
        for side_px, source in sources.items():
            step_views = max(8, min(step_px // side_px, 2 * POOL[source] // shrink) // 8 * 8)
            for blur in blurs:
                for views in arguments.views:
                    path, threads = paths[source], arguments.threads
                    yield source, Case(path, side_px, views, blur, threads, step_views, device)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    rows = rows_of(arguments.out) if arguments.resume else []
    known = [(one["impl"], one["work"]) for one in rows]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.peers, arguments.repeats, arguments.seconds)
        try:
            for source, case in cases(arguments, Path(folder)):
                for name in arguments.peers:
                    peer = PEERS[name]
                    what = work(peer, case, source)
                    if case.device not in peer.devices or (case.blur and not peer.blurs) or (name, what) in known:
                        continue
                    rows += [row(name, what, *measured) for measured in (bench.measured(name, case) or {}).items()]
                    save(arguments, rows)  # a cut-off loses one measurement
        except KeyboardInterrupt:
            print("interrupted: what was measured until here is kept", file=sys.stderr)
        bench.close()
    table(rows)
    save(arguments, rows)


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    """What an earlier call has measured."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path and path.exists() else []


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.out is not None:
        recipe = {"policy": CHAIN | {"blur_p": BLUR_P, "mean": MEAN, "std": STD}, "seconds": arguments.seconds}
        write(arguments.out, "augment", rows, recipe | {"packages": packages()})


def packages() -> dict[str, str]:
    """Versions of what the environment's own list leaves out."""
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


if __name__ == "__main__":
    main()
