"""Threads that end: the one prefetch, loops over many images, and a limit that turns a hang into an error."""

import atexit
import contextlib
import faulthandler
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from fastssl.errors import UserError

T = TypeVar("T")
WATCHDOG_S = 300.0
EXIT_S = 10.0  # that the end of the process waits for a thread

_open: set[Callable[[], None]] = set()


@contextlib.contextmanager
def ended_at_exit(end: Callable[[], None]) -> Generator[None]:
    """Call `end` if the process ends within: a thread that comes back from C++ to an interpreter that is gone takes
    the process down with it, whatever it had to say."""
    _open.add(end)
    try:
        yield
    finally:
        _open.discard(end)


@atexit.register
def _end_open() -> None:
    for end in tuple(_open):
        end()


def prefetch(
    items: Iterator[T], *, limit_s: float | None = WATCHDOG_S, start: Callable[[], None] | None = None
) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use.

    The thread ends with the iteration, also when it is broken off.

    Args:
        items: closed in the thread at its end.
        limit_s: longest wait for one item in seconds, None for ever.
        start: called in the thread first.

    Raises:
        UserError: when one item takes over `limit_s`; whatever `items` raises.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def make() -> None:
        if start is not None:
            start()
        while asked.get():
            try:
                results.put((next(items, None), None))
            except BaseException as error:
                results.put((None, error))
        if isinstance(items, Generator):
            items.close()  # here, where it ran: what it holds open may belong to this thread

    # a daemon: one that hangs must not keep the process from ending
    thread = Thread(target=make, name="fastssl-prefetch", daemon=True)
    thread.start()
    asked.put(True)

    def end(wait_s: float | None) -> None:
        asked.put(False)
        thread.join(wait_s)

    hangs = False
    with ended_at_exit(partial(end, EXIT_S)):
        try:
            while True:
                try:
                    item, error = results.get(timeout=limit_s)
                except Empty:
                    hangs = True
                    assert limit_s is not None
                    raise hang(limit_s) from None
                if error is not None:
                    raise error
                if item is None:
                    return
                asked.put(True)
                yield item
        finally:
            end(0 if hangs else None)


def hang(limit_s: float) -> UserError:
    """What to say when no batch has come for `limit_s` seconds; the stack of every thread goes to the log."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(ValueError, OSError):  # one without a descriptor
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    return UserError(
        f"No batch arrived within {limit_s:g} seconds.",
        "Check that the data's disk answers; else choose resident.",
    )


def spread(work: Callable[[int], None], count: int, threads: int) -> None:
    """Call work(i) for i in range(count) on several threads; the first error stops the rest and is raised."""
    if threads == 1 or count == 1:
        for i in range(count):
            work(i)
        return
    share = max(1, min(64, count // (threads * 4)))

    def run(start: int) -> None:
        for i in range(start, min(start + share, count)):
            work(i)

    with ThreadPoolExecutor(threads, thread_name_prefix="fastssl-decode") as pool:
        try:
            for _ in pool.map(run, range(0, count, share)):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
