"""Runs of items, prepared by several threads and handed back in their order.

Choice made: threads, because the decoders let go of the interpreter. Never more than two runs a thread are under way,
so memory does not grow with the set.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from .prepare import Run, Shape, prepare
from .sources.base import Indexed, Item

_STREAM_ITEMS, _INDEXED_ITEMS, _STREAM_BYTES = 256, 64, 4 << 20


def in_order(runs: Iterable[Callable[[], Run]], workers: int) -> Iterator[Run]:
    """Results of `runs` in their order, `workers` at a time, no more than two each under way."""
    pending: deque[Future[Run]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        for run in runs:
            pending.append(pool.submit(run))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def position_runs(
    source: Indexed, positions_N: NDArray[np.int64], shape: Shape
) -> Iterator[Callable[[], Run]]:
    """Runs of items that the workers read themselves."""
    for start in range(0, len(positions_N), _INDEXED_ITEMS):
        part = positions_N[start : start + _INDEXED_ITEMS].tolist()
        yield functools.partial(_prepare_at, source, part, shape)


def _prepare_at(source: Indexed, positions: list[int], shape: Shape) -> Run:
    return prepare([source.read(i) for i in positions], shape)


def item_runs(items: Iterator[Item], shape: Shape) -> Iterator[Callable[[], Run]]:
    """Runs of items read from a stream, by the one thread that reads it."""
    run: list[Item] = []
    size = 0
    for item in items:
        run.append(item)
        size += len(item.data) if isinstance(item.data, bytes) else 0
        if len(run) == _STREAM_ITEMS or size > _STREAM_BYTES:
            yield functools.partial(prepare, run, shape)
            run, size = [], 0
    yield functools.partial(prepare, run, shape)
