"""Warnings of image libraries, collected for the item being read instead of printed.

Choice made: `warnings.catch_warnings` changes the whole process, and many threads decode at once; so one hook serves
all of them, installed by the first that enters and removed by the last that leaves, and each thread has its own list.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_LIBRARIES = ("PIL", "tifffile")
_thread = threading.local()
_lock = threading.Lock()
_installed = contextlib.ExitStack()
_users = 0


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """What Pillow and tifffile warn of or log in this thread while the context lasts, one line each."""
    outer, texts = getattr(_thread, "texts", None), list[str]()
    _thread.texts = texts
    _enter()
    try:
        yield texts
    finally:
        _leave()
        _thread.texts = outer


def _enter() -> None:
    global _users
    with _lock:
        if _users == 0:
            _installed.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("always", module="|".join(rf"{name}(\.|$)" for name in _LIBRARIES))
            warnings.showwarning = _hook(warnings.showwarning)
            for name in _LIBRARIES:
                logger = logging.getLogger(name)
                logger.addHandler(_handler)
                _installed.callback(logger.removeHandler, _handler)
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            _installed.close()


def _hook(show: Callable[..., None]) -> Callable[..., None]:
    def collect(message: Any, *rest: Any, **named: Any) -> None:
        if not _collect(str(message)):
            show(message, *rest, **named)

    return collect


def _collect(text: str) -> bool:
    """Whether this thread is reading an item, whose list takes the text."""
    texts: list[str] | None = getattr(_thread, "texts", None)
    if texts is not None:
        texts.append(" ".join(text.split()))
    return texts is not None


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _collect(record.getMessage())


_handler = _Handler(logging.WARNING)
