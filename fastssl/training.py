"""Pretraining: load, views, embed, loss, step, maybe evaluate, maybe save. Read `loop` first.

A run directory holds recipe.yaml, environment.json, metrics.jsonl (one line a log step or evaluation), checkpoints/
and, when done, summary.json. Randomness is a function of (seed, epoch, sample, view), so a resume needs only the
weights, the optimiser and the step.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastssl
from fastssl import build, checkpoint, distributed, spectrum
from fastssl.augment.engine import Augment
from fastssl.data.batch import Batch
from fastssl.environment import environment
from fastssl.errors import UserError
from fastssl.interrupts import Interrupted, Interrupts
from fastssl.memory import keep_freed_memory
from fastssl.models import Pretrainer
from fastssl.probe import Prober
from fastssl.recipe import Recipe, dump, load, view_table
from fastssl.step import Terms, train_step

Observer = Callable[[dict[str, Any]], None]


@dataclass
class Clock:
    """Seconds of training (compiling, evaluation, saving apart) and, of those, waiting for images and making views."""

    train_s: float = 0.0
    compile_s: float = 0.0
    load_s: float = 0.0
    views_s: float = 0.0


@dataclass
class Run:
    """The parts of one run, and how far it is."""

    recipe: Recipe
    run_dir: Path
    device: torch.device
    loader: build.Loader
    augment: Augment
    network: Pretrainer
    loss: Callable[[Tensor], Terms]
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    prober: Prober
    manifest: dict[str, Any]
    observe: Observer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    clock: Clock = field(default_factory=Clock)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def views(self) -> int:
        return len(self.augment.views)

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def total_steps(self) -> int:
        return self.recipe.train.epochs * len(self.loader)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    convert_progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Pretrains a backbone as the recipe says and returns the run's summary.

    Args:
        recipe: a Recipe, a mapping, a YAML file or a shipped recipe's name.
        run_dir: where results go; `runs/<recipe's name>` when absent.
        resume: continue from the newest whole checkpoint in `run_dir`, if there is one.
        observe: called with every record of metrics.jsonl as it is written, and with {"event": "start", ...} first.
        convert_progress: called with (file, images done, images in all) while a data file is made.

    Returns:
        What summary.json holds: accuracies in percent, steps, images, views, seconds and rates.

    Raises:
        UserError: for everything a person can mend.
        Interrupted: after a signal, when the checkpoint is written.
    """
    recipe = load(recipe)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    build.check(recipe)
    build.ensure_data(recipe, progress=convert_progress)
    check_run_dir(folder, recipe, resume=resume)
    run = assemble(recipe, folder, observe or (lambda record: None))
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(folder), Interrupts() as interrupts:
        if resume:
            restore(run)
        begin(run)
        loop(run, interrupts)
        return finish(run)


def check_run_dir(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses to mix two runs in one folder."""
    written = folder / "recipe.yaml"
    if not written.exists():
        return
    if not resume:
        raise UserError(f"{folder} already holds a run.", "Add --resume to continue it, or choose another --run-dir.")
    before = load(written)
    changed = different_keys(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{folder} was started with another recipe; {', '.join(changed)} differ.",
            f"Resume with {written}, or choose another --run-dir.",
        )


def different_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix or "all"]
    keys = sorted({*a, *b})
    return [k for key in keys for k in different_keys(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]


def assemble(recipe: Recipe, folder: Path, observe: Observer) -> Run:
    """Builds every part; refuses what cannot work before anything is written."""
    where = build.device(recipe)
    if where.type == "cpu":
        keep_freed_memory()
    manifest = build.manifest_of(recipe.data.path)
    probe_path = recipe.data.probe_path or recipe.data.path
    sets = build.sets(recipe, build.labels_of(recipe.data.path), build.labels_of(probe_path))
    loader = build.loader(recipe, recipe.data.path, sets.train, where=where)
    network = build.network(recipe, in_channels=manifest["channels"], where=where)
    return Run(
        recipe=recipe,
        run_dir=folder,
        device=where,
        loader=loader,
        augment=build.augment(recipe, manifest, where=where),
        network=network,
        loss=build.loss(recipe),
        optimizer=build.optimizer(recipe, network, where=where),
        learning_rate=build.learning_rate(recipe, steps_per_epoch=len(loader)),
        prober=Prober(
            recipe,
            probe_path,
            sets,
            clean=build.clean_view(recipe, manifest, where=where),
            where=where,
            share=loader if recipe.data.probe_path is None else None,
        ),
        manifest=manifest,
        observe=observe,
        scaler=torch.amp.GradScaler(where.type) if recipe.train.precision == "fp16" else None,
    )


def begin(run: Run) -> None:
    """Writes the resolved recipe and the environment, and tells the observer what is about to happen."""
    (run.run_dir / "recipe.yaml").write_text(dump(run.recipe), encoding="utf-8")
    (run.run_dir / "data.json").write_text(json.dumps(run.manifest, indent=1), encoding="utf-8")
    (run.run_dir / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    run.observe(
        {
            "event": "start",
            "step": run.step,
            "total_steps": run.total_steps,
            "batch_size": run.recipe.data.batch_size,
            "views": run.views,
            "device": str(run.device),
            "loader": ": ".join(build.loader_choice(run.recipe, run.recipe.data.path, run.device)),
            "evaluated": run.prober.val is not None,
        }
    )
    risk = build.collapse_risk(run.recipe)
    if risk:
        run.observe({"event": "warning", "message": risk})


def loop(run: Run, interrupts: Interrupts) -> None:
    """All remaining steps. What is due at a step comes before its checkpoint: a resume skips and repeats nothing."""
    compiling = run.recipe.train.compile
    network = torch.compile(run.network) if compiling else run.network
    while run.step < run.total_steps:
        epoch, start = divmod(run.step, len(run.loader))
        mark = time.perf_counter()
        for batch in timed(run.loader.epoch(epoch, start), run.clock):
            groups = views_of(run, batch, epoch)
            terms = train_step(
                network,
                run.loss,
                run.optimizer,
                groups,
                lr=run.learning_rate(run.step),
                autocast=build.autocast(run.recipe),
                scaler=run.scaler,
                accumulate_steps=run.recipe.optim.accumulate_steps,
                clip_norm=run.recipe.optim.clip_norm,
            )
            run.step += 1
            count_seconds(run, time.perf_counter() - mark, compiling=compiling)
            compiling = False
            if due(run, steps=run.recipe.train.log_every_steps, epochs=1):
                log_step(run, terms)
            if due(run, epochs=run.recipe.evaluate.every_epochs):
                evaluate_now(run)
            if interrupts.caught or due(run, epochs=run.recipe.train.checkpoint_every_epochs):
                save(run)
            if interrupts.caught:
                raise Interrupted(interrupts.caught, run.run_dir)
            mark = time.perf_counter()


def count_seconds(run: Run, seconds: float, *, compiling: bool) -> None:
    """Adds a step to the clock; the first one of a compiled network is compilation's, and told once."""
    if compiling:
        run.clock.compile_s += seconds
        run.observe({"event": "note", "message": f"torch.compile took {seconds:.0f} s, not counted as training."})
    else:
        run.clock.train_s += seconds


def due(run: Run, *, epochs: int, steps: int = 0) -> bool:
    """Whether what happens every so many epochs or steps, and at the end, happens after this step; 0 is never."""
    if run.step == run.total_steps or (steps and run.step % steps == 0):
        return True
    return bool(epochs) and run.step % (epochs * len(run.loader)) == 0


def timed(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    """The same batches; adds the seconds spent waiting for each."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        clock.load_s += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def views_of(run: Run, batch: Batch, epoch: int) -> tuple[Tensor, ...]:
    start = time.perf_counter()
    groups = run.augment(batch.images, batch.index_B, epoch, sizes_B2=batch.sizes_B2, offsets_B=batch.offsets_B)
    run.clock.views_s += time.perf_counter() - start
    return groups


def log_step(run: Run, terms: Terms) -> None:
    """One line of metrics; the only place where a step's numbers come to the host."""
    values = {name: float(term) for name, term in terms.items()}
    images = run.step * run.recipe.data.batch_size
    train_s = max(run.clock.train_s, 1e-9)
    record = {
        "event": "step",
        "step": run.step,
        "epoch": run.step / len(run.loader),
        **values,
        "lr": run.learning_rate(run.step - 1),
        "images": images,
        "views": images * run.views,
        "train_s": round(train_s, 3),
        "images_per_s": round(images / train_s, 1),
        "views_per_s": round(images * run.views / train_s, 1),
        "load_pct": round(100 * run.clock.load_s / train_s, 2),
        "views_pct": round(100 * run.clock.views_s / train_s, 2),
    }
    if not math.isfinite(values["loss"]):
        raise UserError(
            f"The loss is not finite at step {run.step}: {', '.join(f'{k} {v:.4g}' for k, v in values.items())}.",
            f"Lower optim.lr or set optim.clip_norm; the last checkpoint in {run.run_dir} is good.",
        )
    write_metrics(run, record)


def evaluate_now(run: Run) -> None:
    """Probes the held-out images, when there are labels."""
    found = run.prober.while_training(run.network.backbone)
    if found:
        epoch = round(run.step / len(run.loader), 6)
        write_metrics(run, {"event": "evaluation", "step": run.step, "epoch": epoch, **found} | spent(run))
        warning = spectrum.collapse_warning(found)
        if warning:
            run.observe({"event": "warning", "message": warning})


def spent(run: Run) -> dict[str, float]:
    return {"train_s": round(run.clock.train_s, 3), "images": run.step * run.recipe.data.batch_size}


def write_metrics(run: Run, record: dict[str, Any]) -> None:
    run.last = {**run.last, **record}
    if distributed.is_main():
        with open(run.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    run.observe(record)


def save(run: Run) -> None:
    """A checkpoint of this moment; keeps the two newest."""
    metrics = run.run_dir / "metrics.jsonl"
    state = {
        "fastssl": fastssl.__version__,
        "data_digest": run.digest,
        "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        "clock": vars(run.clock),
        "last": run.last,
        "scaler": run.scaler.state_dict() if run.scaler else None,
    }
    folder = run.run_dir / "checkpoints"
    try:
        checkpoint.save(
            folder,
            step=run.step,
            weights=checkpoint.snapshot(run.network),
            optimizer=checkpoint.optimizer_snapshot(run.optimizer),
            state=state,
        )
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {run.step} cannot be written: {error.strerror}.",
            f"Free space on the disk of {run.run_dir} and continue with --resume; earlier checkpoints are whole.",
        ) from error
    checkpoint.prune(folder, keep=2)


def restore(run: Run) -> None:
    """Puts the newest whole checkpoint back, and cuts metrics.jsonl to that moment.

    Raises:
        UserError: when the data has changed since.
    """
    found = checkpoint.latest(
        run.run_dir / "checkpoints", warn=lambda text: run.observe({"event": "warning", "message": text})
    )
    if found is None:
        (run.run_dir / "metrics.jsonl").unlink(missing_ok=True)
        return
    weights, optimizer, state = found
    if state["data_digest"] != run.digest:
        raise UserError(
            f"{run.recipe.data.path} has changed: its digest was {state['data_digest']} and is {run.digest}.",
            "Put the earlier file back, or start a new run with another --run-dir.",
        )
    run.network.load_state_dict(weights)
    checkpoint.restore_optimizer(run.optimizer, optimizer)
    if run.scaler and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.clock, run.last = state["step"], Clock(**state["clock"]), state["last"]
    metrics = run.run_dir / "metrics.jsonl"
    if metrics.exists():
        with open(metrics, "r+b") as file:
            file.truncate(state["metrics_bytes"])


def finish(run: Run) -> dict[str, Any]:
    """Evaluates on the test set, once, and writes summary.json."""
    recipe, found = run.recipe, dict[str, float]()
    if recipe.data.test_path is not None:
        found = run.prober.at_the_end(run.network.backbone, recipe.data.test_path)
        if recipe.evaluate.baselines and found:
            found |= run.prober.baselines(run.manifest["channels"], recipe.data.test_path)
    val = {k: v for k, v in run.last.items() if k not in ("event",)}
    images = run.step * recipe.data.batch_size
    summary = {
        "name": recipe.name,
        "run_dir": str(run.run_dir),
        "epochs": recipe.train.epochs,
        "steps": run.step,
        "images": images,
        "views": images * len(view_table(recipe.augment)),
        "train_s": round(run.clock.train_s, 1),
        "compile_s": round(run.clock.compile_s, 1),
        "views_per_s": round(images * run.views / max(run.clock.train_s, 1e-9), 1),
        "data_digest": run.digest,
        **found,
        "validation": val,
    }
    (run.run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary
