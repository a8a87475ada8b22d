"""Compiling the kernels that make views before the clock starts: it takes a while, the first time on a machine."""

import threading
import time

from fastssl.training.state import Run

QUIET_S = 2.0  # kernels that are in numba's or Triton's cache take less


def compile_kernels(run: Run) -> None:
    """Makes a batch's views once, unseen; the seconds count as compilation, and a long wait is announced."""
    epoch = run.step // len(run.loader)
    augment = run.augment_of(epoch)
    if augment.backend.name == "torch" or run.step >= run.total_steps:
        return
    batches = run.loader.epoch(epoch)  # any batch will do, and a stream decodes all that come before one
    batch = next(batches)
    note = {"event": "note", "message": "Compiling the kernels that make views, once on this machine ..."}
    announced = threading.Timer(QUIET_S, run.observe, [note])
    announced.daemon = True
    announced.start()
    mark = time.perf_counter()
    try:
        augment(batch, epoch)
    finally:
        announced.cancel()
        if hasattr(batches, "close"):
            batches.close()
    seconds = time.perf_counter() - mark
    run.clock.compile_s += seconds
    if seconds > QUIET_S:
        run.observe({"event": "note", "message": f"Compiled in {seconds:.0f} s, not counted as training."})
