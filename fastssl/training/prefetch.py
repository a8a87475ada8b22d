"""The next batch's views while this step runs: on CUDA a side stream makes them, on the CPU a thread of its own.

On CUDA the kernels of a step and of the next views run together, and a step waits for neither loading nor augmentation;
launching needs no thread. On the CPU a step of a small network leaves its cores idle a good part of the time: its
operators are short, and some stay on one thread. The views' kernels hold no lock of Python's, and fill those gaps.
"""

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.augment.backend import Backend
from fastssl.data.batch import Batch
from fastssl.data.loaders.threads import prefetch
from fastssl.data.loaders.transfer import SideStream

Views = tuple[Tensor, ...]
MakeViews = Callable[[Batch], Views]
TRIAL_STEPS = 8
SHARE_OF_THREADS = 4  # one in so many makes views


class Timed(NamedTuple):
    """A batch's views, and the seconds that loading it and making them took; or kept the caller waiting."""

    views: Views
    load_s: float
    views_s: float


def prefetch_views(
    batches: Iterator[Batch],
    make_views: MakeViews,
    device: torch.device,
    *,
    backend: Backend,
    waited: Callable[[float, float], None] = lambda load_s, views_s: None,
) -> Iterator[Views]:
    """The views of each batch, in order.

    Args:
        batches: on the device; closed when the iteration ends.
        make_views: batch to one (V_g, B, C, H, W) tensor per side length, without waiting for the device.
        device: of the network.
        backend: of the views.
        waited: called with the seconds that the caller waited for each batch and for its views.
    """
    items = timed(batches, make_views)
    if device.type == "cuda":
        items = on_side_stream(items, device)
    elif backend.runs_in_thread and torch.get_num_threads() > 1:
        items = during_the_step(items, backend)
    try:
        for views, load_s, views_s in items:
            waited(load_s, views_s)
            yield views
    finally:
        items.close()  # ends the thread
        if hasattr(batches, "close"):
            batches.close()


def timed(batches: Iterator[Batch], make_views: MakeViews) -> Generator[Timed]:
    """Batches loaded and their views made by whichever thread asks."""
    while True:
        mark = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        loaded = time.perf_counter()
        views = make_views(batch)
        yield Timed(views, loaded - mark, time.perf_counter() - loaded)


def during_the_step(items: Generator[Timed], backend: Backend) -> Generator[Timed]:
    """Views made by one thread in the background, or here by all of them once that is seen to be sooner."""
    threads = torch.get_num_threads()
    few = max(1, threads // SHARE_OF_THREADS)

    def in_background(some: Iterator[Timed]) -> Iterator[tuple[Timed, float]]:
        return with_waits(
            prefetch(some, limit_s=None, start=partial(backend.limit_threads, few))
        )  # a step has its watchdog

    waited_s = made_s = 0.0
    for i, (item, wait_s) in enumerate(in_background(islice(items, TRIAL_STEPS + 1))):
        if i:  # nothing ran during the first
            waited_s, made_s = waited_s + wait_s, made_s + item.views_s
        yield waited_share(item, wait_s)
    if waited_s > made_s * few / threads:
        yield from items
    else:
        for item, wait_s in in_background(items):
            yield waited_share(item, wait_s)


def with_waits(items: Iterator[Timed]) -> Iterator[tuple[Timed, float]]:
    """The same items, each with the seconds that it kept the caller waiting."""
    while True:
        mark = time.perf_counter()
        item = next(items, None)
        if item is None:
            return
        yield item, time.perf_counter() - mark


def waited_share(item: Timed, wait_s: float) -> Timed:
    """The item with its wait in place of its seconds, in their proportion."""
    share = wait_s / max(item.load_s + item.views_s, 1e-9)
    return Timed(item.views, item.load_s * share, item.views_s * share)


def on_side_stream(items: Generator[Timed], device: torch.device) -> Generator[Timed]:
    """Items launched one ahead on a stream of their own."""
    side = SideStream(device)
    item, ready = side.make(partial(next, items, None))
    while item is not None:
        side.hand_over(ready, iter(item.views))
        following = side.make(partial(next, items, None))
        yield item
        item, ready = following
