"""Pretraining: load, views, embed, loss, step, maybe evaluate, maybe save. Read `loop` first.

A run directory holds recipe.yaml, environment.json, metrics.jsonl (one line a log step or evaluation), checkpoints/
and, when done, summary.json. Under torchrun every rank runs this same file; rank 0 writes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import build
from fastssl.build import ranks
from fastssl.data.batch import Batch
from fastssl.errors import Interrupted, UserError
from fastssl.losses.loss import Terms
from fastssl.probes import table
from fastssl.recipe import progressive
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe, ViewSpec
from fastssl.runs import checkpoint
from fastssl.runs.directory import check_run_dir, lock, record_failure, write_beginnings
from fastssl.training import guards, parallel, precision, step_graph
from fastssl.training.distributed import agree
from fastssl.training.finish import finish
from fastssl.training.guards import NAMES, Interrupts, torch_settings
from fastssl.training.own_parts import OwnLoss, with_own
from fastssl.training.plain import plain_torch
from fastssl.training.prefetch import prefetch_views
from fastssl.training.progress import ConversionProgress
from fastssl.training.resume import restore, save
from fastssl.training.saver import must_be_whole
from fastssl.training.state import Observer, Run, assemble
from fastssl.training.threads import threads
from fastssl.training.trackers import observers
from fastssl.training.warm_up import compile_kernels

MOST_SKIPPED_IN_A_ROW = 50
GROUP_TIMEOUT_S = 24 * 3600.0  # converting may take hours; a step that hangs is the watchdog's


@plain_torch()
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    convert_progress: ConversionProgress | None = None,
    progress: bool | None = None,
    backbone: nn.Module | None = None,
    loss: OwnLoss | None = None,
    policy: Sequence[ViewSpec] | None = None,
) -> dict[str, Any]:
    """Pretrains a backbone as the recipe says and returns the run's summary.

    Args:
        recipe: a Recipe, a mapping, a YAML file or a shipped recipe's name.
        run_dir: where results go; `runs/<recipe's name>` when absent.
        resume: continue from the newest whole checkpoint in `run_dir`, if there is one.
        observe: called with every record of metrics.jsonl as it is written, and with {"event": "start", ...} first.
        convert_progress: called with (file, images done, images in all) while a data file is made.
        progress: show what happens on standard error: a bar in a terminal, else a line per epoch and every 30 s. None
            shows it in a terminal and a notebook, unless `observe` is given.
        backbone: a module to train in place of the recipe's, from images (N, C, H, W) to features (N, F).
        loss: to use in place of the recipe's, from embeddings (V, B, D), float32, to a scalar, or to terms of which
            "loss" is it; the recipe cannot name it, so a resume has to be given it again.
        policy: the view table, a row per view, in place of the recipe's; the recipe written to the run has it.

    Returns:
        What summary.json holds: accuracies in percent, steps, images, views, seconds and rates.

    Raises:
        UserError: for everything a person can fix.
        Interrupted: after a signal, when the checkpoint is written.
    """
    given = with_own(load(recipe), backbone, policy)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / given.name
    goes_on = resume and bool(checkpoint.existing(folder / "checkpoints"))  # from weights of its own
    build.preflight.check(build.model.drawn(given) if goes_on else given)
    given, precision_taken = precision.choose(given, folder)
    check_run_dir(folder, given, resume=resume)
    recipe = build.run_data.resumed(given, folder) if resume else given
    ranks.start(build.hardware.device(recipe).type, timeout_s=GROUP_TIMEOUT_S)
    build.checks.check_parts(recipe)
    with observers(given, folder, progress, observe, convert_progress) as (observing, converting, writers):
        build.data.ensure_data_once(recipe, progress=converting)
        with torch_settings(recipe), threads(recipe) as threads_taken:
            run = assemble(recipe, folder, observing, backbone=backbone, loss=loss, goes_on=goes_on)
            if ranks.is_main():
                folder.mkdir(parents=True, exist_ok=True)
            alone = lock(folder, on_warning=run.warn) if ranks.is_main() else contextlib.nullcontext()
            with alone, Interrupts() as interrupts:
                try:
                    ranks.barrier()  # the lock is held, the folder is there
                    if resume:
                        restore(run)
                    with record_failure(folder if ranks.is_main() else None):
                        begin(run, given, {"threads": threads_taken, "precision": precision_taken})
                        with build.hardware.seeded(recipe.seed, run.device):  # anew for each step; then the caller's
                            loop(run, interrupts)
                            summary = finish(run, partial(stop_asked, run, interrupts))
                            writers.summary(summary)
                            return summary
                finally:
                    run.saver.close()
                    parallel.close(run.train_step)


def begin(run: Run, given: Recipe, chosen: dict[str, str]) -> None:
    """Writes the recipe as given, with every default, and the environment, and reports what is about to happen."""
    account, reason = run.network.weights_account, choose_parallel(run)
    if ranks.is_main():
        weights = account.to_json() if account else None
        data = run.manifest.to_json() | {"files": build.run_data.places(given, run.recipe)}
        write_beginnings(run.run_dir, given, data, weights=weights, trains=not is_finished(run))
        if run.step < run.total_steps:  # of an end that is no more: begun again, or given more epochs
            (run.run_dir / "summary.json").unlink(missing_ok=True)
    run.observe(
        {
            "event": "start",
            "step": run.step,
            "images": run.images,
            "train_s": run.clock.train_s,
            "total_steps": run.total_steps,
            "batch_size": run.recipe.data.batch_size,
            "views": run.views,
            "device": str(run.device),
            "ranks": ranks.world(),
            **chosen,
            "loader": ": ".join(run.loader_chosen),
            "parallel": f"{run.parallel}: {reason}",
            "evaluated": run.prober.val is not None,
        }
    )
    if run.recipe.data.path != given.data.path:
        run.observe({"event": "note", "message": f"{given.data.path} is {run.recipe.data.path}, as the run began."})
    if account and run.step == 0:
        run.observe({"event": "note", "message": account.sentence()})
    if run.average:
        message = f"Evaluation and exports take weights averaged with decay {run.average.decay:g} (optim.ema)."
        run.observe({"event": "note", "message": message})
    for warning in (
        None if run.own_loss else build.losses.collapse_risk(run.recipe),
        build.views.idle_color(run.recipe, run.manifest.channels),
        *build.idle.idle_settings(run.recipe),
        *build.run_data.made_otherwise(run.recipe),
        build.views.fallback(run.recipe, run.augment_of(0), device=run.device),
        *run.prober.not_measured,
        build.hardware.emulation(run.recipe, run.device),
        step_graph.not_used(run.recipe, run.device),
    ):
        if warning:
            run.warn(warning)


def is_finished(run: Run) -> bool:
    return run.step == run.total_steps and (run.run_dir / "summary.json").exists()


def choose_parallel(run: Run) -> str:
    """Has threads share views or operators, as at the run's beginning, and says why."""
    began, reason = run.parallel, "as the run began"
    obstacle = parallel.obstacle_to_views(run.recipe, run.device)
    if began == parallel.VIEWS and obstacle:  # it went on elsewhere; its recipe may not change
        run.parallel, reason = parallel.OPERATORS, f"{obstacle}; the run began with {began}"
    elif not began:
        with build.hardware.seeded(run.recipe.seed, run.device):
            run.parallel, reason = parallel.choose(
                run.recipe, run.train_step, run.network, in_channels=run.manifest.channels, device=run.device
            )
    if run.parallel == parallel.VIEWS:
        run.train_step = parallel.view_parallel(run.train_step, run.network, workers=torch.get_num_threads())
    return reason


def loop(run: Run, interrupts: Interrupts) -> None:
    """All remaining steps. What is due at a step comes before its checkpoint: a resume skips and repeats nothing."""
    with guards.memory_explained(run.recipe):
        compile_kernels(run)
    skipped_in_a_row, sides_seen = 0, set[int]()
    with guards.memory_explained(run.recipe), guards.Watchdog(run.recipe.train.step_timeout_s) as watchdog:
        mark, counted = watchdog.clock(), run.step
        while run.step < run.total_steps:
            epoch, start = divmod(run.step, len(run.loader))
            compiling = new_side(run, epoch, sides_seen) and bool(run.recipe.train.compile)
            for views in views_of_epoch(run, epoch, start):
                build.hardware.reseed(build.hardware.seed_of_step(run.recipe.seed, run.step), run.device)
                terms = run.train_step(views, run.learning_rate(run.step), number=run.step)
                run.step += 1
                skipped_in_a_row = watch(run, terms, skipped_in_a_row)
                if not skipped_in_a_row:
                    average_weights(run, terms)
                watchdog.pat()
                if compiling or anything_due(run, interrupts):
                    count_seconds(run, watchdog, mark, steps=run.step - counted, compiling=compiling)
                    compiling = False
                    do_what_is_due(run, interrupts, None if skipped_in_a_row else terms, alive=watchdog.pat)
                    watchdog.pat()
                    mark, counted = watchdog.clock(), run.step


def average_weights(run: Run, terms: Terms) -> None:
    """Takes the step into the average, from the first that was taken on: fp16's scaler leaves out some before."""
    if run.average and (run.average.steps or bool(terms["gradient_norm"].isfinite())):
        run.average.update(run.network)


def anything_due(run: Run, interrupts: Interrupts) -> bool:
    return bool(interrupts.caught) or due_to_log(run) or due_to_evaluate(run) or due_to_save(run)


def do_what_is_due(run: Run, interrupts: Interrupts, terms: Terms | None, *, alive: Callable[[], None]) -> None:
    """After a step: its line of metrics, an evaluation, a checkpoint, the end.

    Args:
        terms: the step's, None when it was left out.
        alive: called while an evaluation goes on, which may take longer than a step.

    Raises:
        Interrupted: after a signal, when the checkpoint is written.
    """
    if due_to_log(run) and terms is not None:
        log_step(run, terms)
    improved = due_to_evaluate(run) and evaluate_now(run, alive)
    signal = stop_asked(run, interrupts)
    if signal or improved or due_to_save(run):
        stop_if_bad(run)
        save(run)
    if signal:
        must_be_whole(run.saver, run.step)
        ranks.meet()  # a rank that ends has torchrun stop the others: first the checkpoint is whole
        raise Interrupted(signal, run.run_dir)


def largest_side_px(run: Run, epoch: int) -> int:
    return progressive.largest_side_px(run.recipe.augment, epoch, run.recipe.train.epochs)


def new_side(run: Run, epoch: int, seen: set[int]) -> bool:
    """Whether this process has not yet trained on views of this epoch's size; a change of size is recorded."""
    side_px = largest_side_px(run, epoch)
    if side_px in seen:
        return False
    if run.recipe.augment.progressive:
        run.observe({"event": "note", "message": f"Views of up to {side_px} px from epoch {epoch} on."})
    seen.add(side_px)
    return True


def views_of_epoch(run: Run, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
    """The views of the epoch's remaining batches."""
    augment = run.augment_of(epoch)

    def make_views(batch: Batch) -> tuple[Tensor, ...]:
        return augment(batch, epoch)

    batches = run.loader.epoch(epoch, start)
    return prefetch_views(batches, make_views, run.device, backend=augment.backend, waited=run.clock.waited)


def watch(run: Run, terms: Terms, skipped_in_a_row: int) -> int:
    """Looks out for values that are not finite; steps left out in a row, up to now.

    Raises:
        UserError: when nothing but such steps come.
    """
    if "skipped" not in terms:
        if run.train_step.scaler:  # it leaves out a step whose gradient is not finite, and tries a smaller scale
            looked_at = {name: term for name, term in terms.items() if name != "gradient_norm"}
            run.bad.watch(run.step, looked_at, norm=terms["gradient_norm"])
        else:
            run.bad.watch(run.step, terms)
        return 0
    if not float(terms.pop("skipped")):
        return 0
    run.skipped_steps += 1
    values = {name: float(term) for name, term in terms.items()}
    if skipped_in_a_row == 0:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        run.warn(f"Step {run.step} is left out: its loss or gradient is not finite ({shown}).")
    if skipped_in_a_row + 1 >= MOST_SKIPPED_IN_A_ROW:
        raise not_finite(run, run.step, values)
    return skipped_in_a_row + 1


def not_finite(run: Run, step: int, values: dict[str, float]) -> UserError:
    graph = run.recipe.train.cuda_graph
    return guards.not_finite(step, values, run.network, last_good=run.saver.last_good(), graph=graph)


def stop_if_bad(run: Run) -> None:
    """Ends the run, before anything bad is saved, when a step since the last look had a value that is not finite."""
    bad = run.bad.values()
    if bad:
        raise not_finite(run, *bad)
    left_out = run.bad.in_a_row()
    if left_out >= MOST_SKIPPED_IN_A_ROW:
        norm = {"gradient_norm": run.bad.last_norm()}
        raise not_finite(run, run.step, norm)


def count_seconds(run: Run, watchdog: guards.Watchdog, mark: float, *, steps: int, compiling: bool) -> None:
    """Adds the seconds since `mark`, by the watchdog's clock, to the run's, once the device is done with these steps.

    The first step of a compiled network at a size of views is compilation's, which is reported.
    """
    build.hardware.wait(run.device)
    seconds = watchdog.clock() - mark
    if compiling:
        run.clock.compile_s += seconds
        run.observe({"event": "note", "message": f"torch.compile took {seconds:.0f} s, not counted as training."})
        return
    run.clock.train_s += seconds
    side_px = largest_side_px(run, (run.step - 1) // len(run.loader))
    slow = run.slow_steps.warning(side_px=side_px, steps=steps, seconds=seconds)
    if slow and run.device.type == "cpu":
        run.warn(slow)


def due(run: Run, *, epochs: int, steps: int = 0) -> bool:
    """Whether what happens every so many epochs or steps, and at the end, happens after this step; 0 is never."""
    if run.step == run.total_steps or (steps and run.step % steps == 0):
        return True
    return bool(epochs) and run.step % (epochs * len(run.loader)) == 0


def due_to_log(run: Run) -> bool:
    return due(run, steps=run.recipe.train.log_every_steps, epochs=1)


def due_to_evaluate(run: Run) -> bool:
    return due(run, epochs=run.recipe.evaluate.every_epochs, steps=run.recipe.evaluate.every_steps)


def due_to_save(run: Run) -> bool:
    spec = run.recipe.train
    if due(run, epochs=spec.checkpoint_every_epochs, steps=spec.checkpoint_every_steps) or run.saver.retry_due():
        return True
    return bool(spec.checkpoint_every_minutes) and run.saver.minutes_since() >= spec.checkpoint_every_minutes


def stop_asked(run: Run, interrupts: Interrupts) -> str | None:
    """The signal that ends the run here. Ranks agree on it at log steps and in the end: to ask costs a round trip."""
    if ranks.world() == 1:
        return interrupts.caught
    if not due_to_log(run):
        return None
    code = agree(NAMES.index(interrupts.caught) + 1 if interrupts.caught else 0, run.device)
    return NAMES[code - 1] if code else None


def log_step(run: Run, terms: Terms) -> None:
    """One line of metrics; the only place where a step's numbers come to the host."""
    stop_if_bad(run)
    images = run.images
    train_s = max(run.clock.train_s, 1e-9)
    side_px = largest_side_px(run, (run.step - 1) // len(run.loader))
    run.record(
        {
            "event": "step",
            "step": run.step,
            "epoch": run.step / len(run.loader),
            **{name: float(term) for name, term in terms.items()},
            "lr": run.learning_rate(run.step - 1),
            "images": images,
            "views": images * run.views,
            "train_s": round(train_s, 3),
            "images_per_s": round(images / train_s, 1),
            "views_per_s": round(images * run.views / train_s, 1),
            "load_pct": round(100 * run.clock.load_s / train_s, 2),
            "views_pct": round(100 * run.clock.views_s / train_s, 2),
            **({"side_px": side_px} if run.recipe.augment.progressive else {}),
        }
    )


def evaluate_now(run: Run, alive: Callable[[], None]) -> bool:
    """Measures the features, on held-out images too where there are labels; whether accuracy is better than ever."""
    stop_if_bad(run)  # names the step and what to set; features that are not finite would not
    with guards.evaluation_explained(run.recipe, more=", or evaluate.max_train to fewer images in a new run"):
        metrics = run.prober.while_training(run.evaluated.backbone, alive=alive)
    if not metrics:
        return False
    epoch = round(run.step / len(run.loader), 6)
    spent = {"train_s": round(run.clock.train_s, 3), "images": run.images}
    run.record({"event": "evaluation", "step": run.step, "epoch": epoch, **metrics, **spent})
    for kind, message in table.remarks(metrics, done=run.step / run.total_steps).items():
        run.warn_once(kind, message)
    metric = run.recipe.evaluate.metric
    if metrics.get(metric, -1.0) <= run.best.get(metric, -1.0):
        return False
    run.best = {"step": run.step, "epoch": epoch, metric: metrics[metric]}
    return True
