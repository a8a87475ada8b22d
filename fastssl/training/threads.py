"""How many threads a run computes with on the CPU, chosen once and recorded.

Left alone, torch takes a thread for each of the machine's cores, whatever a container's quota, and every operation
then waits for threads that have no core.
"""

import contextlib
from collections.abc import Iterator

import numba
import torch

from fastssl.build import ranks
from fastssl.recipe.schema import Recipe
from fastssl.runs.machine import cores


def choose(recipe: Recipe) -> tuple[int, str]:
    """Threads of this process, and one phrase that says why."""
    if recipe.train.threads != "auto":
        return recipe.train.threads, f"{counted(recipe.train.threads)}: train.threads"
    allowed, local = cores(), ranks.local_world()
    count = max(1, allowed.count // local)
    shared = f", shared by {local} ranks" if local > 1 else ""
    if torch.get_num_threads() < count:  # OMP_NUM_THREADS, or a caller that knows better
        count, shared = torch.get_num_threads(), f"{shared}, as torch was set"
    return count, f"{counted(count)}: {allowed}{shared}"


def counted(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


@contextlib.contextmanager
def threads(recipe: Recipe) -> Iterator[str]:
    """While entered, torch and numba compute with the recipe's threads; gives the phrase that says how many."""
    before = torch.get_num_threads(), numba.get_num_threads()
    count, reason = choose(recipe)
    apply(count, min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield reason
    finally:
        apply(*before)


@contextlib.contextmanager
def within_cores() -> Iterator[None]:
    """While entered, torch and numba compute with no more threads than there are cores to use; a decorator too."""
    before, count = (torch.get_num_threads(), numba.get_num_threads()), cores().count
    apply(min(before[0], count), min(before[1], count))
    try:
        yield
    finally:
        apply(*before)


def apply(for_torch: int, for_numba: int) -> None:
    torch.set_num_threads(for_torch)
    numba.set_num_threads(for_numba)
