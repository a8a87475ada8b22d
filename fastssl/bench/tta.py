"""Time to accuracy: recipes side by side, seed by seed, until each first reaches the targets.

The clock is training's own (`train_s` of metrics.jsonl): evaluation, checkpoints and compilation stand apart and are
reported apart. Finished runs are read from their run directories, unfinished ones continue from their checkpoints.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastssl import build
from fastssl.bench.crossing import Timed, first_crossing, median_or_none, speed_up
from fastssl.bench.parts import parts
from fastssl.bench.record import record, row
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.recipe.load import load
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe
from fastssl.runs import reading
from fastssl.runs.files import atomic_json
from fastssl.training import loop
from fastssl.training.precision import holds_another

Observer = Callable[[dict[str, Any]], None]
WARMUP_STEPS = 2
SIDECAR = "tta.json"
MADE_BY = ("commit", "hardware", "versions")
ALIKE = (
    "data.val_count",
    *(f"evaluate.{name}" for name in ("knn_k", "max_train", "side_px", "whitened_knn", "linear_epochs_while_training")),
)


class Reached(BaseException):
    """Ends a run before its last epoch: raised in an observer, between two steps. No Exception, which a run records."""


@dataclass(frozen=True)
class Ends:
    """What ends a run at an evaluation: all targets where that is asked for, or so many seconds of training."""

    targets: Mapping[str, float]
    stop_at_target: bool = False
    budget_s: float = math.inf

    def reached(self, seen: Sequence[dict[str, Any]]) -> bool:
        """Whether the evaluations seen so far end the run."""
        if seen and seen[-1]["train_s"] >= self.budget_s:
            return True
        return self.stop_at_target and all(first_crossing(seen, m, pct, views=1) for m, pct in self.targets.items())


@dataclass(frozen=True)
class Trial:
    """One recipe with one seed.

    Attributes:
        evaluations: records of metrics.jsonl up to here.
        trained_s: training time in all.
        compile_s: of torch.compile, not in `trained_s`; None for a run stopped at its target.
        apart_s: evaluation, saving, set-up and compilation, over all sittings; None for a run made elsewhere.
        made_by: commit, hardware and versions of the run, which may be of an earlier call.
    """

    seed: int
    evaluations: list[dict[str, Any]]
    trained_s: float
    compile_s: float | None
    apart_s: float | None
    made_by: dict[str, Any]


def tta(
    recipes: Sequence[Recipe],
    targets: dict[str, float],
    *,
    seeds: int,
    folder: Path,
    stop_at_target: bool = False,
    budget_s: float = math.inf,
    observe: Observer = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
    keep: Observer = lambda record: None,
) -> dict[str, Any]:
    """The benchmark record: rows for each recipe and target, speed-ups over the first recipe, and all curves.

    Args:
        recipes: the first is the one the others are compared with; all on the same data and evaluation.
        targets: metric of an evaluation (knn20_pct, ridge_pct, ...) to percent.
        seeds: n; seed i of a recipe is its own seed plus i.
        folder: a run directory for each recipe and seed goes here.
        stop_at_target: end a run once all targets are reached.
        budget_s: end a run at the first evaluation after so many seconds of training.
        observe: called with each run's records.
        say: called with what happens.
        keep: gets the record of what is finished after every run, so that a cut-off loses nothing.

    Raises:
        UserError: when the recipes cannot be compared, a target is not measured while training, or the budget is none.
        Interrupted: after a signal; the same call continues from there.
    """
    if not budget_s > 0:
        raise UserError(
            f"{option('budget_s')} is {budget_s:g}, in which nothing trains.", f"Set {option('budget_s')} above 0."
        )
    digest = same_work(recipes)
    ends = Ends(targets, stop_at_target, budget_s)
    raise_all(errors_of(*(partial(check_data, folder, recipe, seed) for recipe in recipes for seed in range(seeds))))
    check_targets(targets, recipes[0])
    trials: dict[str, list[Trial]] = {recipe.name: [] for recipe in recipes}
    warm: set[str] = set()
    latest: dict[str, Any] = {}
    for seed in range(seeds):
        for recipe in recipes:
            seeded = load(recipe, [f"seed={recipe.seed + seed}"])
            run_dir = folder / f"{recipe.name}-s{seeded.seed}"
            if not finished(run_dir, seeded, ends):
                if recipe.name not in warm:
                    say(f"Warm-up of {recipe.name}: {WARMUP_STEPS} steps, not timed")
                    warm_up(recipe)
                    warm.add(recipe.name)
                say(f"{recipe.name}, seed {seeded.seed}")
                run(seeded, run_dir, ends, observe=observe)
            trials[recipe.name].append(trial(run_dir, seeded.seed, ends.budget_s))
            latest = result(recipes, ends, trials, digest)
            keep(latest)
    return latest


def check_targets(targets: Mapping[str, float], recipe: Recipe) -> None:
    """Refuses, before anything runs, targets that evaluations while training do not measure.

    Raises:
        UserError: naming every one of them.
    """
    learn, held_out = labeled_images(recipe)
    if not learn or not held_out:
        raise UserError(
            f"No labeled images are held out ({learn} to learn from, {held_out} held out), so no target is measured.",
            "Set data.val_count, in a file with labels.",
        )
    epochs = recipe.evaluate.linear_epochs_while_training
    of_knn = [f"knn{k}_pct" for k in recipe.evaluate.knn_k]
    known = [*of_knn, *(f"whitened_{key}" for key in of_knn if recipe.evaluate.whitened_knn), "ridge_pct"]
    known += ["linear_pct"] * bool(epochs)
    raise_all(not_measured(metric, known) for metric in targets if metric not in known)


def labeled_images(recipe: Recipe) -> tuple[int, int]:
    """How many images probes learn from while training, and how many are held out."""
    data = recipe.data
    labels_N, probe_labels_N = (build.data.labels_of(path) for path in (data.path, data.probe_path or data.path))
    sets = build.data.sets(recipe, labels_N, probe_labels_N)
    learn = build.data.some_of(sets.probe, recipe.evaluate.max_train)
    return len(learn), len(build.data.of_known_classes(probe_labels_N, learn, sets.val)[0])


def not_measured(metric: str, known: Sequence[str]) -> UserError:
    if metric == "linear_pct":
        return UserError(
            "The linear probe is not trained while training.", "Add -s evaluate.linear_epochs_while_training=20, say."
        )
    names = ", ".join(key.removesuffix("_pct") for key in known)
    return UserError(
        f"{metric.removesuffix('_pct')} is not measured while training.", f"Set {option('target')} to some of: {names}."
    )


def same_work(recipes: Sequence[Recipe]) -> str:
    """The data's digest. All recipes must learn from the same file and be measured alike.

    Raises:
        UserError: naming what differs.
    """
    first, names = recipes[0], [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError("Two recipes have one name: " + ", ".join(names) + ".", "Set another `name:` in one of them.")
    for other in recipes[1:]:
        for key in ALIKE:
            section, name = key.split(".")
            a, b = (getattr(getattr(recipe, section), name) for recipe in (first, other))
            if a != b:
                raise UserError(
                    f"{first.name} and {other.name} are not measured alike: {key} is {a} and {b}.",
                    f"Give both the same, for example -s {key}={b}.",
                )
    digests = {recipe.name: digest_of(recipe) for recipe in recipes}
    if len(set(digests.values())) > 1:
        raise UserError(
            f"The recipes' data differ: {', '.join(f'{name} {digest[:12]}' for name, digest in digests.items())}.",
            "Point data.path (and data.probe_path) of all of them at the same files.",
        )
    return digests[first.name]


def digest_of(recipe: Recipe) -> str:
    paths = [recipe.data.path] + ([recipe.data.probe_path] if recipe.data.probe_path else [])
    return "+".join(build.data.manifest_of(path).digest for path in paths)


def warm_up(recipe: Recipe) -> None:
    """Steps of parts that are then thrown away: kernels get compiled, libraries loaded, memory taken."""
    training = parts(load(recipe, ["train.compile=false"]))
    for _, (batch, epoch) in zip(range(WARMUP_STEPS), training.batches(), strict=False):
        training.step(training.views(batch, epoch))
    if not recipe.data.drop_last:  # for a batch of another size cuDNN chooses its kernels anew, which takes seconds
        for batch in training.loader.epoch(0, len(training.loader) - 1):
            training.step(training.views(batch, 0))


def check_data(folder: Path, recipe: Recipe, seed: int) -> None:
    """Refuses a run of an earlier call that learned from other images under the same name."""
    run_dir = folder / f"{recipe.name}-s{recipe.seed + seed}"
    data = reading.read_mapping(run_dir / "data.json")
    files = data.get("files") or {}
    for path, before in (
        (recipe.data.path, data.get("digest")),
        (recipe.data.probe_path, files.get("probe_path", {}).get("digest")),
    ):
        if path is not None and before not in (None, build.data.manifest_of(path).digest):
            raise UserError(
                f"{run_dir} was made with other images than {path} holds now.",
                f"Choose another {option('run_dir')}, or remove that folder.",
            )


def finished(run_dir: Path, recipe: Recipe, ends: Ends) -> bool:
    """Whether a run directory holds all that is wanted.

    Raises:
        UserError: when it holds another recipe's run.
    """
    if not (run_dir / "recipe.yaml").exists():
        return False
    if holds_another(run_dir, recipe):
        raise UserError(
            f"{run_dir} holds a run of another recipe.", f"Choose another {option('run_dir')}, or remove that folder."
        )
    if (run_dir / "summary.json").exists():
        return True
    return ends.reached(evaluations_of(run_dir))


def run(recipe: Recipe, run_dir: Path, ends: Ends, *, observe: Observer) -> None:
    """Trains to what ends it; records the seconds that were not training in the run's folder."""
    start, before_s = time.perf_counter(), apart_of(run_dir) or 0.0
    watch = Watch(run_dir, ends, observe=observe)
    try:
        loop.train(recipe, run_dir=run_dir, resume=True, observe=watch)
    except Reached:
        pass
    finally:
        if run_dir.is_dir():
            apart_s = before_s + time.perf_counter() - start - watch.trained_s
            atomic_json(run_dir / SIDECAR, {"apart_s": round(apart_s, 3)})


class Watch:
    """Passes records on, counts the sitting's training seconds, and raises Reached when that is asked for."""

    def __init__(self, run_dir: Path, ends: Ends, *, observe: Observer) -> None:
        self.run_dir, self.ends, self.observe = run_dir, ends, observe
        self.seen: list[dict[str, Any]] = []
        self.trained_s = self.resumed_s = 0.0

    def __call__(self, line: dict[str, Any]) -> None:
        self.observe(line)
        if line["event"] == "start" and line["step"]:  # metrics.jsonl now ends where the checkpoint was made
            self.resumed_s = last_train_s(self.run_dir)
            self.seen = evaluations_of(self.run_dir)
        if "train_s" in line:
            self.trained_s = line["train_s"] - self.resumed_s
        if line["event"] == "evaluation":
            for metric in self.ends.targets:
                if metric not in line:
                    raise not_measured(metric, [key for key in line if key.endswith("_pct")])
            self.seen.append(line)
            if self.ends.reached(self.seen):
                raise Reached


def apart_of(run_dir: Path) -> float | None:
    apart_s = reading.read_mapping(run_dir / SIDECAR).get("apart_s")
    return None if apart_s is None else float(apart_s)


def last_train_s(run_dir: Path) -> float:
    return max((line["train_s"] for _, line in reading.read_metrics(run_dir / "metrics.jsonl")), default=0.0)


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    """A run's evaluations; a last line without its end is left out."""
    lines = reading.read_metrics(run_dir / "metrics.jsonl")
    return [{"event": event} | line for event, line in lines if event == "evaluation"]


def trial(run_dir: Path, seed: int, budget_s: float) -> Trial:
    """A finished run, read from its directory, up to its first evaluation after the budget."""
    seen = evaluations_of(run_dir)
    spent = next((number for number, one in enumerate(seen, 1) if one["train_s"] >= budget_s), None)
    trained_s = last_train_s(run_dir) if spent is None else seen[spent - 1]["train_s"]
    compile_s = reading.read_mapping(run_dir / "summary.json").get("compile_s")
    made = reading.read_mapping(run_dir / "environment.json")
    made_by = {key: made.get(key) for key in MADE_BY}
    return Trial(seed, seen[:spent], trained_s, compile_s, apart_of(run_dir), made_by)


def result(recipes: Sequence[Recipe], ends: Ends, trials: dict[str, list[Trial]], digest: str) -> dict[str, Any]:
    """The record of all trials."""
    targets, rows, speed_ups = ends.targets, [], []
    for metric, pct in targets.items():
        timed = {recipe.name: times(trials[recipe.name], metric, pct) for recipe in recipes}
        for recipe in recipes:
            rows += recipe_rows(recipe, trials[recipe.name], metric, pct)
        base = recipes[0].name
        speed_ups += [
            {"recipe": recipe.name, "against": base, "metric": metric, "target_pct": pct}
            | speed_up(timed[base], timed[recipe.name])
            for recipe in recipes[1:]
        ]
    for recipe in recipes:
        for name in ("compile_s", "apart_s"):
            values = [getattr(trial, name) for trial in trials[recipe.name]]
            rows.append(row(recipe.name, {}, name, [value for value in values if value is not None]))
    return record(
        "tta",
        rows,
        recipes[0].model_dump(mode="json"),
        data_digest=digest,
        targets=targets,
        budget_s=None if math.isinf(ends.budget_s) else ends.budget_s,
        recipes={recipe.name: recipe.model_dump(mode="json") for recipe in recipes},
        clock="training only: evaluation, checkpoints and compilation apart",
        warmup=f"{WARMUP_STEPS} untimed steps of each recipe in this process, and one of any short last batch",
        speed_ups=speed_ups,
        curves={name: [vars(trial) for trial in done] for name, done in trials.items()},
    )


def times(done: list[Trial], metric: str, pct: float) -> list[Timed]:
    crossings = [(first_crossing(trial.evaluations, metric, pct, views=1), trial) for trial in done]
    return [Timed(at.train_s, True) if at else Timed(trial.trained_s, False) for at, trial in crossings]


def recipe_rows(recipe: Recipe, done: list[Trial], metric: str, pct: float) -> list[dict[str, Any]]:
    """What a recipe needed to reach one target, over its seeds; the median counts seeds that did not arrive."""
    views = len(view_table(recipe.augment))
    crossings = [first_crossing(trial.evaluations, metric, pct, views=views) for trial in done]
    rows = []
    for name in ("train_s", "steps", "epochs", "images", "views", "gap_s"):
        values = [None if at is None else float(getattr(at, name)) for at in crossings]
        entry = row(recipe.name, {"target": metric, "pct": pct}, name, [v for v in values if v is not None])
        rows.append(entry | {"median": median_or_none(values), "seeds": len(done)})
    best = [max((e.get(metric, 0.0) for e in trial.evaluations), default=0.0) for trial in done]
    rows.append(row(recipe.name, {"target": metric, "pct": pct}, "best_pct", best))
    return rows


def parse_targets(text: str, recipe: Recipe) -> dict[str, float]:
    """knn=80,linear=85 to {"knn20_pct": 80.0, "linear_pct": 85.0}; knn is the first of the recipe's evaluate.knn_k.

    Raises:
        UserError: naming every part that is not of that form, and every metric that comes twice.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [
        UserError(
            f"{option('target')} {part!r} is not of the form name=percent.",
            "Write for example knn=80 or knn=80,ridge=82, in percent.",
        )
        for part in parts
        if target_of(part, recipe) is None
    ]
    pairs = [pair for part in parts if (pair := target_of(part, recipe))]
    metrics = [metric for metric, _ in pairs]
    twice = dict.fromkeys(metric.removesuffix("_pct") for metric in metrics if metrics.count(metric) > 1)
    wrong += [UserError(f"{option('target')} gives {name} twice.", "Give each accuracy once.") for name in twice]
    raise_all(wrong)
    return dict(pairs)


def target_of(part: str, recipe: Recipe) -> tuple[str, float] | None:
    """Metric and percent; None for what is not name=percent."""
    name, equals, number = (piece.strip() for piece in part.partition("="))
    try:
        pct = float(number)
    except ValueError:
        return None
    if not equals or not name or not 0 < pct <= 100:
        return None
    metric = f"knn{recipe.evaluate.knn_k[0]}" if name == "knn" else name
    return metric.removesuffix("_pct") + "_pct", pct
