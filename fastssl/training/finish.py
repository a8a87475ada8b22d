"""A run's end: the evaluation on the test set, and summary.json."""

from collections.abc import Callable
from typing import Any

from fastssl.build import ranks
from fastssl.errors import Interrupted, UserError, option
from fastssl.recipe.presets import view_table
from fastssl.runs.files import atomic_json
from fastssl.training import guards
from fastssl.training.saver import must_be_whole
from fastssl.training.state import Run

StopAsked = Callable[[], str | None]


def finish(run: Run, stop_asked: StopAsked) -> dict[str, Any]:
    """Evaluates on the test set, once, and writes summary.json.

    Args:
        run: whose steps are all taken.
        stop_asked: the signal that ends the run here, asked as often on one rank as on another.

    Raises:
        UserError: when the end of the run cannot be saved.
        Interrupted: after a signal; all steps are saved.
    """
    must_be_whole(run.saver, run.step)
    recipe, metrics = run.recipe, final_evaluation(run, stop_asked)
    images = run.images
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
        "parallel": run.parallel,
        "precision": recipe.train.precision,
        "data_digest": run.digest,
        **({"own_loss": True} if run.own_loss else {}),
        **({"skipped_steps": run.skipped_steps} if run.skipped_steps else {}),
        **metrics,
        "validation": {k: v for k, v in run.last.items() if k != "event"},
        "best": run.best,
    }
    if ranks.is_main():
        waits = run.records.flush()
        if waits:
            raise UserError(
                f"metrics.jsonl cannot be written: {waits}.",
                f"Free space on the disk of {run.run_dir} and call again with {option('resume', True)}.",
            )
        atomic_json(run.run_dir / "summary.json", summary)
    ranks.barrier()
    return summary


def final_evaluation(run: Run, stop_asked: StopAsked) -> dict[str, float]:
    """Evaluates on the test set; empty without one.

    Raises:
        Interrupted: soon after a signal; a resume repeats this evaluation alone.
    """
    recipe, prober = run.recipe, run.prober

    def progress(what: str, done: int, total: int) -> None:
        run.tell_progress(what, done, total)
        if signal := stop_asked():
            raise Interrupted(signal, run.run_dir)

    if recipe.data.test_path is None:
        return {}
    with guards.evaluation_explained(recipe):
        metrics = prober.at_the_end(run.evaluated.backbone, recipe.data.test_path, progress=progress)
        if recipe.evaluate.baselines and metrics:
            metrics |= prober.baselines(run.manifest.channels, recipe.data.test_path, progress=progress)
    return metrics
