"""The same job through our loop, lightly's and a plain one: views per second and time to the same kNN accuracy.

python bench/tta_peers.py [RECIPE] --target 38 [--seeds 3] [--budget-s 200]

All loops share the recipe's optimizer; ours also runs with Muon. Each run is a separate process, the loops in turn for
every seed. The clock starts after the first WARMUP steps and stops while accuracy is measured, with our kNN for all. A
missing peer is reported and left out. At the end, our step with loading and augmentation is compared with the same
network on a fixed batch. Writes bench/results/tta_peers.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "peers")]

import torch  # noqa: E402
from claims import as_command, at_least_one  # noqa: E402
from loops import LOOPS, job_of, note_of  # noqa: E402
from resume import another, earlier, here, refuse_another_grid, say_kept  # noqa: E402

from fastssl import build  # noqa: E402
from fastssl.bench.crossing import Timed, median_or_none, speed_up  # noqa: E402
from fastssl.bench.parts import work  # noqa: E402
from fastssl.bench.record import record, row, save  # noqa: E402
from fastssl.bench.variants import step as step_variants  # noqa: E402
from fastssl.cli.bench_tables import rendered, table_of  # noqa: E402
from fastssl.errors import UserError  # noqa: E402
from fastssl.probes import evaluate  # noqa: E402
from fastssl.recipe.load import load  # noqa: E402
from fastssl.recipe.schema import Recipe  # noqa: E402
from fastssl.training.online_probes import Prober  # noqa: E402

WARMUP = 5
MUON = "fastssl, Muon"
CHANGES = {MUON: ["optim.name=muon", "optim.lr=0.05"]}  # ours with what the peers do not have
NAMES = [*CHANGES, *LOOPS]
LARGER = ["model.backbone=resnet18", "model.stem=cifar", "model.width=1", "data.batch_size=32"]


def follow(
    name: str, recipe: Recipe, *, target_pct: float, every_steps: int, budget_s: float, workers: int
) -> dict[str, Any]:
    """One run to the target, to the end of the recipe or of the budget: its curve and views per second between
    evaluations."""
    backbone, steps = LOOPS[name.partition(",")[0]](load(recipe, CHANGES.get(name, [])), workers)
    knn = knn_of(recipe)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    if sum(1 for _ in zip(range(WARMUP), steps, strict=False)) < WARMUP:
        sys.exit(f"The recipe ends within the {WARMUP} steps of the warm-up.")
    wait()
    train_s, images, curve, rates = 0.0, 0, list[dict[str, float]](), list[float]()
    while train_s < budget_s:
        start, part = time.perf_counter(), 0
        for _, count in zip(range(every_steps), steps, strict=False):
            part += count
        wait()
        passed = time.perf_counter() - start
        if not part:
            break
        train_s, images = train_s + passed, images + part
        rates.append(2 * part / passed)
        step = WARMUP + images // recipe.data.batch_size
        curve.append({"train_s": train_s, "steps": step, "views": 2 * images, "knn_pct": knn(backbone)})
        if curve[-1]["knn_pct"] >= target_pct:
            break
    return {"curve": curve, "views_per_s": rates}


def knn_of(recipe: Recipe) -> Any:
    """A function of the backbone: kNN accuracy on the recipe's held-out images, in percent."""
    device, data = build.hardware.device(recipe), recipe.data
    manifest, labels = build.data.manifest_of(data.path), build.data.labels_of(data.path)
    clean = build.views.clean_view(recipe, manifest, device=device)
    prober = Prober(recipe, data.path, build.data.sets(recipe, labels, labels), clean=clean, device=device)

    def knn(backbone: torch.nn.Module) -> float:
        embed = prober.embed_with(backbone)
        parts = [tensor for part in (prober.learn, prober.val) for tensor in part.features(embed)]
        found = evaluate.knn(*parts, ks=recipe.evaluate.knn_k[:1])
        return next(iter(found.values()))

    return knn


def in_a_process(name: str, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """`follow` in a fresh process; None, with a word why, where the peer is missing or fails."""
    job = {"name": name, "recipe": recipe.model_dump(mode="json")} | limits_of(arguments)
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} is left out: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    last = found["curve"][-1]
    said = f"{name}, seed {recipe.seed}: {last['knn_pct']:.1f} % after {last['train_s']:.1f} s"
    print(f"{said}, {sum(found['views_per_s']) / len(found['views_per_s']):,.0f} views/s", file=sys.stderr)
    return found


def runs_of(path: Path, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of an earlier call like this one.

    Raises:
        UserError: when they are of another recipe, machine, target, budget or distance of evaluations.
    """
    before = earlier(path, "tta_peers", recipe)
    if before is None:
        return {}
    if not here(before):
        raise another(path, "machine")
    limits = "target, budget, distance of evaluations or number of workers"
    refuse_another_grid(path, before, arguments, parse, limits_of, what=limits)
    runs: dict[str, list[dict[str, Any]]] = before["curves"]
    kept = sum(map(len, runs.values()))
    say_kept(path, kept, kept)
    return runs


def limits_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run is given, as arguments of `follow`."""
    return {
        "target_pct": arguments.target,
        "every_steps": arguments.every_steps,
        "budget_s": arguments.budget_s,
        "workers": arguments.workers,
    }


def rows_of(name: str, runs: list[dict[str, Any]], recipe: Recipe, target_pct: float) -> list[dict[str, Any]]:
    """Views per second of every stretch, and the time and views to the target over seeds."""
    what = work(recipe, build.hardware.device(recipe))
    note = note_of(name, recipe) or ({"note": " ".join(CHANGES[name])} if name in CHANGES else {})
    rows = [row(name, what, "views_per_s", [rate for one in runs for rate in one["views_per_s"]], **note)]
    arrived = [one["curve"][-1] if one["curve"][-1]["knn_pct"] >= target_pct else None for one in runs]
    goal = what | {"target": "knn_pct", "pct": target_pct}
    for key in ("train_s", "steps", "views"):
        values = [at and at[key] for at in arrived]
        made = row(name, goal, key, [value for value in values if value is not None], **note)
        rows.append(made | {"median": median_or_none(values), "seeds": len(runs)})
    rows.append(row(name, goal, "best_pct", [max(e["knn_pct"] for e in one["curve"]) for one in runs], **note))
    return rows


def timed(runs: list[dict[str, Any]], target_pct: float) -> list[Timed]:
    return [Timed(one["curve"][-1]["train_s"], one["curve"][-1]["knn_pct"] >= target_pct) for one in runs]


def fixed_rows(recipe: Recipe, seconds: float) -> list[dict[str, Any]]:
    """Our step as trained against a fixed batch from memory, with the job's network and with ResNet-18.

    Many short windows in turn, so that a slow spell of the machine falls on both.
    """
    rows = []
    for changed in (recipe, load(recipe, LARGER)):
        found = step_variants(changed, seconds=seconds, rounds=25, only=["fixed batch", "as trained"])
        rows += [one | {"impl": f"fastssl, {one['impl']}"} for one in found["rows"]]
    return rows


def report(
    runs: dict[str, list[dict[str, Any]]], recipe: Recipe, arguments: argparse.Namespace, fixed: list[dict[str, Any]]
) -> dict[str, Any]:
    """The record, with the speed-ups of ours over every peer."""
    target_pct = arguments.target
    rows = [one for name, done in runs.items() for one in rows_of(name, done, recipe, target_pct)] + fixed
    ours = [name for name in runs if name.startswith("fastssl")]
    speed_ups = [
        {"recipe": own, "against": name, "metric": "knn_pct", "target_pct": target_pct}
        | speed_up(timed(runs[name], target_pct), timed(runs[own], target_pct))
        | {"views_per_s_ratio": ratio(rows, own, name)}
        for own in ours
        for name in runs
        if name not in ours
    ]
    return record(
        "tta_peers",
        rows,
        recipe.model_dump(mode="json"),
        data_digest=build.data.manifest_of(recipe.data.path).digest,
        targets={"knn_pct": target_pct},
        warmup=f"the first {WARMUP} steps are not timed",
        clock="training only: the accuracy is measured with the clock stopped",
        speed_ups=speed_ups,
        curves=runs,
    )


def ratio(rows: list[dict[str, Any]], own: str, peer: str) -> float:
    medians = {one["impl"]: one["median"] for one in rows if one["metric"] == "views_per_s"}
    return float(medians[own] / medians[peer])


def text(made: dict[str, Any]) -> str:
    lines = []
    for one in made["rows"]:
        figures = ["-" if one[key] is None else f"{one[key]:,.2f}" for key in ("median", "min", "max")]
        lines.append([one["impl"], one["metric"], *figures, str(one["n"])])
    said = [
        f"{one['recipe']} against {one['against']}: {one['views_per_s_ratio']:.2f} times the views per second;"
        f" {sooner(one)}."
        for one in made["speed_ups"]
    ]
    return rendered(table_of("The same job", ["loop", "metric", "median", "min", "max", "n"], lines), *said)


def sooner(one: dict[str, Any]) -> str:
    """What a speed-up says of the time to the target."""
    if one["ratio"] is None:
        return "neither reached the target with every seed"
    times = f"{one['ratio']:.2f} times" if one["bound"] == "exact" else f"{one['bound']} {one['ratio']:.2f} times"
    spread = "" if one["low"] is None else f", {one['low']:.2f} to {one['high']:.2f} by bootstrap"
    return f"at the target {times} sooner (n = {one['n']}{spread})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "bench" / "peers" / "small.yaml"))
    parser.add_argument("-s", dest="changes", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--target", type=float, default=38.0, help="kNN accuracy in percent")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--every-steps", type=at_least_one, default=50, help="between measurements of the accuracy")
    parser.add_argument("--budget-s", type=float, default=200.0, help="of training, for each run")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument(
        "--fixed-s", type=float, default=40.0, help="for each network against a fixed batch; 0 for none"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tta_peers.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out holds of this recipe")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.one:
        job = json.loads(arguments.one)
        print(json.dumps(follow(job.pop("name"), load(job.pop("recipe")), **job)))
        return
    if not arguments.budget_s > 0:
        raise UserError(f"--budget-s is {arguments.budget_s:g}.", "Set --budget-s above 0, to 200 for example.")
    recipe = job_of(arguments.recipe, arguments.changes)
    runs = runs_of(arguments.out, recipe, arguments) if arguments.resume else {}
    missing: set[str] = set()
    for seed in range(arguments.seeds):
        for name in arguments.peers:
            if name in missing or len(runs.get(name, [])) > seed:
                continue
            found = in_a_process(name, load(recipe, [f"seed={seed}"]), arguments)
            if found is None:
                missing.add(name)
            else:
                runs.setdefault(name, []).append(found)
                save(arguments.out, report(runs, recipe, arguments, []))  # a cut-off loses one run
    if not runs:
        sys.exit("No loop has run.")
    fixed = fixed_rows(recipe, arguments.fixed_s) if arguments.fixed_s else []
    made = report(runs, recipe, arguments, fixed)
    save(arguments.out, made)
    print(text(made))


if __name__ == "__main__":
    as_command(main)
