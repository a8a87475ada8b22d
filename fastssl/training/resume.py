"""A checkpoint's state: what a run saves besides weights and moments, and how it continues from there.

Randomness is a function of (seed, epoch, sample, view), so the step is all that a resume needs to know of it.
"""

import json
from typing import Any

import torch

from fastssl.build import ranks
from fastssl.build.run_data import changed
from fastssl.errors import UserError, option
from fastssl.recipe.load import load
from fastssl.runs import checkpoint
from fastssl.runs.directory import same_recipe
from fastssl.runs.files import json_text
from fastssl.training.state import Clock, Run
from fastssl.version import __version__


def save(run: Run) -> None:
    """A checkpoint of this moment; keeps the newest ones and the best. Skipped while metrics cannot be written."""
    if problem := run.records.sync():
        run.saver.refuse(f"metrics.jsonl cannot be written: {problem}")
        return
    epoch, position = divmod(run.step, len(run.loader))
    scaler = run.train_step.scaler
    state = {
        "fastssl": __version__,
        "torch": torch.__version__,
        "epoch": epoch,
        "step_in_epoch": position,
        "ranks": ranks.world(),
        "recipe": run.recipe.model_dump(mode="json"),
        "data_digest": run.digest,
        "metrics_bytes": run.records.size(),
        "clock": vars(run.clock).copy(),
        "last": run.last,
        "best": run.best,
        "skipped_steps": run.skipped_steps,
        "parallel": run.parallel,
        "scaler": scaler.state_dict() if scaler else None,
        **({"averaged_steps": run.average.steps} if run.average else {}),
        **({"own_loss": True} if run.own_loss else {}),
    }
    state = json.loads(json_text(state))  # written later, by a thread: a copy of this moment
    run.saver.save(
        run.network,
        run.train_step.optimizer,
        step=run.step,
        state=state,
        best_step=run.best.get("step"),
        average=run.average.network if run.average else None,
    )


def restore(run: Run) -> None:
    """Puts the newest whole checkpoint back, and cuts metrics.jsonl to that moment.

    Raises:
        UserError: when the data or the recipe has changed since, or ranks see different checkpoints.
    """
    newest = checkpoint.latest(run.run_dir / "checkpoints", warn=run.warn)
    same_everywhere(run, newest[2]["step"] if newest else 0)
    if newest is None:
        refuse_if_damaged(run)
        if (run.run_dir / "summary.json").exists():
            raise UserError(
                f"{run.run_dir} is finished, and its checkpoints are gone.",
                f"Nothing is left to do; to train anew, choose another {option('run_dir')}, or remove summary.json.",
            )
        run.records.cut(0)
        return
    weights, moments, state, average = newest
    check_state(run, state)
    if ranks.is_main():
        checkpoint.set_aside(run.run_dir / "checkpoints", after=state["step"])
    run.network.load_state_dict(weights)
    if run.average and average is not None:
        run.average.network.load_state_dict(average)
        run.average.steps = state["averaged_steps"]
    checkpoint.restore_optimizer(run.train_step.optimizer, moments)
    if run.train_step.scaler and state["scaler"]:
        run.train_step.scaler.load_state_dict(state["scaler"])
    run.step, run.clock, run.last = state["step"], Clock(**state["clock"]), state["last"]
    run.best, run.skipped_steps = state["best"], state["skipped_steps"]
    if run.saver.folder is not None and run.best:
        run.saver.best = checkpoint.path_of(run.saver.folder, run.best["step"])
    run.parallel = state.get("parallel", "")
    if run.recipe.data.path.is_dir() and state["step_in_epoch"] and state["ranks"] != ranks.world():
        run.warn(
            f"A folder of shards is read in another order by {ranks.world()} ranks than by {state['ranks']}: in this "
            "epoch some images come twice and others not at all."
        )
    if run.records.size() < state["metrics_bytes"]:
        run.warn(f"{run.run_dir / 'metrics.jsonl'} lacks lines of the first {run.step:,} steps; the rest follows.")
        run.records.cut_to_lines()
    run.records.cut(state["metrics_bytes"])


def refuse_if_damaged(run: Run) -> None:
    """Starting at step 0 over a run whose checkpoints are all damaged would silently throw its work away."""
    folder = run.run_dir / "checkpoints"
    names = [path.name for path in checkpoint.existing(folder)]
    and_summary = " and summary.json" if (run.run_dir / "summary.json").exists() else ""
    if names:
        raise UserError(
            f"Every checkpoint in {folder} is damaged: {', '.join(names)}.",
            f"Put a whole one back; to start again from step 0 instead, remove {folder}{and_summary}.",
        )


def check_state(run: Run, state: dict[str, Any]) -> None:
    if state["data_digest"] != run.digest:
        raise changed(run.recipe.data.path, state["data_digest"], run.digest)
    same_recipe(load(state["recipe"]), run.recipe, f"The checkpoint of step {state['step']} in {run.run_dir}")
    if state.get("own_loss", False) and not run.own_loss:
        raise UserError(f"{run.run_dir} was trained with a loss from Python.", "Resume it there, with the same loss=.")
    if run.own_loss and not state.get("own_loss", False):
        raise UserError(f"{run.run_dir} was trained with the recipe's loss.", "Resume it without loss=.")


def same_everywhere(run: Run, step: int) -> None:
    steps = ranks.gather_rows(torch.tensor([step], device=run.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"The ranks see checkpoints of different steps in {run.run_dir}: {steps}.",
            f"Give a {option('run_dir')} on a disk that every machine shares.",
        )
