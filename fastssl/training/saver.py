"""Checkpoints of a run while it trains: the loop waits for the copy to host memory, a thread does the writing.

A disk that is full or away costs a warning: training continues, earlier checkpoints stay, and the next try follows
within a minute.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.errors import UserError, option
from fastssl.runs import checkpoint

RETRY_S = 30.0


class Saver:
    """Writes one checkpoint at a time, in order.

    Args:
        folder: of the checkpoints; None on ranks that do not write.
        keep: the newest so many stay, and the best.
        on_warning: called with one sentence when a write fails.
    """

    def __init__(self, folder: Path | None, *, keep: int, on_warning: Callable[[str], None]) -> None:
        self.folder, self.keep, self.on_warning = folder, keep, on_warning
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="fastssl-save")
        self.writing: Future[Path] | None = None
        self.saved_s = time.monotonic()
        self.problem = ""
        self.best: Path | None = None  # the newest of the best checkpoints that was written

    def save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        state: Mapping[str, Any],
        best_step: int | None,
        average: nn.Module | None = None,
    ) -> None:
        """Copies weights and moments to host memory and has them written; first waits for the write before it."""
        self.wait()
        self.saved_s = time.monotonic()
        if self.folder is not None:
            weights = checkpoint.snapshot(network)
            moments = checkpoint.optimizer_snapshot(optimizer)
            best = None if best_step is None else checkpoint.path_of(self.folder, best_step)
            averaged = None if average is None else checkpoint.snapshot(average)
            self.writing = self.pool.submit(self.write, step, weights, moments, state, best, averaged)

    def write(
        self, step: int, weights: Any, moments: Any, state: Mapping[str, Any], best: Path | None, average: Any
    ) -> Path:
        assert self.folder is not None
        path = checkpoint.save(self.folder, step=step, weights=weights, optimizer=moments, state=state, average=average)
        if best is not None and best.is_dir():
            self.best = best
        checkpoint.prune(self.folder, keep=self.keep, protect=self.best)
        return path

    def wait(self) -> bool:
        """Whether the checkpoint being written, if any, is now whole on disk."""
        if self.writing is None:
            return not self.problem
        try:
            self.writing.result()
            self.problem = ""
        except OSError as error:
            first = not self.problem
            self.problem = error.strerror or str(error)
            if first:
                self.on_warning(
                    f"The checkpoint could not be written ({self.problem}). Training continues and tries again;"
                    f" earlier checkpoints are whole. Free space on the disk of {self.folder}."
                )
        self.writing = None
        return not self.problem

    def refuse(self, problem: str) -> None:
        """In place of `save`, where a checkpoint would count lines that are not on disk; as after a failed write."""
        self.wait()
        self.problem, self.saved_s = problem, time.monotonic()

    def retry_due(self) -> bool:
        """Whether the last write failed and it is time for another."""
        if self.writing is not None and self.writing.done():
            self.wait()
        return bool(self.problem) and time.monotonic() - self.saved_s > RETRY_S

    def minutes_since(self) -> float:
        return (time.monotonic() - self.saved_s) / 60

    def close(self) -> None:
        """Ends the thread once the last write has ended."""
        self.wait()
        self.pool.shutdown()

    def last_good(self) -> str:
        """Names the newest checkpoint, for a message."""
        self.wait()
        whole = checkpoint.existing(self.folder) if self.folder is not None else []
        return f"the last good checkpoint is {whole[0]}" if whole else "there is no checkpoint yet"


def must_be_whole(saver: Saver, step: int) -> None:
    """Waits for the last write.

    Raises:
        UserError: when the run's end could not be saved.
    """
    if not saver.wait():
        raise UserError(
            f"The checkpoint of step {step} cannot be written: {saver.problem}.",
            f"Free space on the disk of {saver.folder} and continue with {option('resume', True)}; "
            "earlier checkpoints are whole.",
        )
