"""Runs of items, prepared by several threads and handed back in their order.

Choice made: threads, because the decoders let go of the interpreter. A run holds as many items as make about
8 MiB of pixels, going by the one that last came back, and never more than two runs a thread are under way: memory
grows neither with the set nor with its images.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastssl.data.convert.prepare import Run, Shape, prepare
from fastssl.data.sources.base import Indexed, Item

_FIRST_ITEMS, _MOST_ITEMS = 16, 256
_RUN_BYTES = 8 << 20
_ENCODED_BYTES = 4 << 20  # of a stream's run, which is in memory before anybody knows its pixels


def indexed_runs(source: Indexed, positions_N: NDArray[np.int64], shape: Shape, workers: int) -> Iterator[Run]:
    """The items at `positions_N`, read by the threads themselves."""
    pace = _Pace()

    def todo() -> Iterator[Callable[[], Run]]:
        start = 0
        while start < len(positions_N):
            part = positions_N[start : start + pace.items].tolist()
            start += len(part)
            yield functools.partial(prepare, map(source.read, part), shape)  # read by the thread that prepares

    return _in_order(todo(), shape, workers, pace)


def stream_runs(items: Iterable[Item], shape: Shape, workers: int) -> Iterator[Run]:
    """The items of a stream, read by the thread that asks for the runs."""
    pace = _Pace()

    def todo() -> Iterator[Callable[[], Run]]:
        iterator = iter(items)
        while part := list(_some(iterator, pace.items)):
            yield functools.partial(prepare, iter(part), shape)

    return _in_order(todo(), shape, workers, pace)


def _some(items: Iterator[Item], count: int) -> Iterator[Item]:
    """Up to `count` items, fewer where their encoded bytes are many."""
    size = 0
    for item in itertools.islice(items, count):
        yield item
        if isinstance(item.data, bytes):
            size += len(item.data)
            if size > _ENCODED_BYTES:
                return


class _Pace:
    """How many items the next run takes."""

    def __init__(self) -> None:
        self.items = _FIRST_ITEMS

    def saw(self, run: Run) -> None:
        if run.pixel_bytes:
            self.items = min(_MOST_ITEMS, max(1, _RUN_BYTES * len(run.data) // run.pixel_bytes))


def _in_order(todo: Iterator[Callable[[], Run]], shape: Shape, workers: int, pace: _Pace) -> Iterator[Run]:
    pending: deque[Future[Run]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        for work in todo:
            pending.append(pool.submit(work))
            if len(pending) > 2 * workers:
                yield from _to_its_end(pending.popleft().result(), shape, pace)
        while pending:
            yield from _to_its_end(pending.popleft().result(), shape, pace)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _to_its_end(run: Run, shape: Shape, pace: _Pace) -> Iterator[Run]:
    """A run and, where its images were larger than guessed, what it left over."""
    while True:
        pace.saw(run)
        rest, run.rest = run.rest, None
        yield run
        if rest is None:
            return
        run = prepare(rest, shape)
