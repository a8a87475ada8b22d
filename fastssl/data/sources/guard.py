"""The one place where what readers raise on damaged files becomes a sentence with the file's name."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from fastssl.data.decode import reason
from fastssl.data.sources.base import Indexed, Item, Source
from fastssl.errors import Interrupted, UserError


def guarded(open_source: Callable[..., Source]) -> Callable[..., Source]:
    """The same function; the source that it returns, too, raises nothing but UserError.

    A stream that breaks ends with the error. An item by position that cannot be read is an `Item` with the reason.
    """

    @functools.wraps(open_source)
    def opened(spec: Any, **options: Any) -> Source:
        with explained(str(spec)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the parser that numpy gives headers to
            warnings.filterwarnings("ignore", "invalid ", category=DeprecationWarning)  # the same before Python 3.12
            warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required additional header")
            source = open_source(spec, **options)
        if isinstance(source, Indexed):
            return dataclasses.replace(source, read=functools.partial(_read, source))
        return dataclasses.replace(source, items=functools.partial(_items, source.name, source.items))

    return opened


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Every exception of a reader as a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise in_two_lines(error) from error.__cause__
    except Interrupted:
        raise
    except Exception as error:  # zipfile, csv, numpy, pyarrow and json raise nearly everything on hostile bytes
        raise UserError(
            f"{name} cannot be read: {reason(error)}.",
            "Check that it is whole and what its name says.",
        ) from error


def in_two_lines(error: UserError) -> UserError:
    """The same error without the line breaks of what a hostile file names its columns and splits."""
    error.what, error.fix = (" ".join(text.splitlines()) for text in (error.what, error.fix))
    error.args = (f"{error.what}\n{error.fix}",)
    return error


def _read(source: Indexed, index: int) -> Item:
    try:
        return source.read(index)
    except UserError:
        raise
    except Exception as error:
        key = f"{source.name}[{index}]"
        return Item(key, ValueError(f"{key!r} cannot be read: {reason(error)}"), int(source.labels_N[index]))


def _items(name: str, items: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    with explained(name):
        yield from items()
