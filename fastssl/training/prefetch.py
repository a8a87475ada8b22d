"""The next batch's views while this step runs: on CUDA a side stream makes them, on the CPU a thread of its own.

On CUDA the kernels of a step and of the next views run together, and a step waits for neither loading nor augmentation.
On the CPU a step of a small network leaves its cores idle a good part of the time: its operators are short, and some
stay on one thread. The views' kernels hold no lock of Python's, and fill those gaps.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastssl.augment.backend import Backend
from fastssl.data.batch import Batch

Groups = tuple[Tensor, ...]
Views = Callable[[Batch], Groups]
TRIAL_STEPS = 8
SHARE_OF_THREADS = 4  # one in so many makes views


def views_ahead(batches: Iterator[Batch], views: Views, device: torch.device, *, backend: Backend) -> Iterator[Groups]:
    """The views of each batch, in order.

    Args:
        batches: on the device; closed when the iteration ends.
        views: batch to one (V_g, B, C, H, W) tensor per side length, without waiting for the device.
        device: of the network.
        backend: of the views.
    """
    try:
        if device.type == "cuda":
            yield from on_side_stream(batches, views, device)
        elif backend.runs_in_thread and torch.get_num_threads() > 1:
            yield from in_background(batches, views, backend)
        else:
            yield from map(views, batches)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def in_background(batches: Iterator[Batch], views: Views, backend: Backend) -> Iterator[Groups]:
    """Views made by one thread in the background, or here by all of them once that is seen to be sooner."""
    threads = torch.get_num_threads()
    few = max(1, threads // SHARE_OF_THREADS)
    waited_s = made_s = 0.0
    with ThreadPoolExecutor(1, "views", initializer=backend.limit_threads, initargs=(few,)) as pool:

        def submitted() -> "Future[tuple[Groups, float]] | None":
            batch = next(batches, None)
            return None if batch is None else pool.submit(timed, views, batch)

        waiting, count = submitted(), 0
        while waiting is not None:
            mark = time.perf_counter()
            groups, seconds = waiting.result()
            if count:  # nothing ran beside the first
                waited_s, made_s = waited_s + time.perf_counter() - mark, made_s + seconds
            if count == TRIAL_STEPS and waited_s > made_s * few / threads:
                break
            waiting, count = submitted(), count + 1
            yield groups
    if waiting is not None:
        yield groups
        yield from map(views, batches)


def timed(views: Views, batch: Batch) -> tuple[Groups, float]:
    """Views, and the seconds they took."""
    mark = time.perf_counter()
    return views(batch), time.perf_counter() - mark


def on_side_stream(batches: Iterator[Batch], views: Views, device: torch.device) -> Iterator[Groups]:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def launch() -> tuple[Groups, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            return None if batch is None else (views(batch), side.record_event())

    waiting = launch()
    while waiting is not None:
        groups, made = waiting
        current = torch.cuda.current_stream(device)
        current.wait_event(made)
        for group in groups:
            group.record_stream(current)  # its memory is the side stream's: not to be reused before this step is done
        waiting = launch()
        yield groups
