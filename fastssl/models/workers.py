"""Threads that share whole pieces of work, each with one thread per operator.

An operator on several threads ends where the last of them does, and one whose core was taken by another program keeps
the others waiting, hundreds of times a forward pass. Workers wait for each other once.
"""

import copy
import functools
import itertools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from fastssl.errors import SlowWarning
from fastssl.runs.machine import cores

START_S = 0.01


def pool(count: int, name: str) -> ThreadPoolExecutor:
    """So many threads, all started."""
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))
    list(workers.map(time.sleep, [START_S] * count))
    torch.set_num_threads(threads)  # a worker's setting is also that of threads still to come
    return workers


@functools.cache
def lasting_pool(count: int, process: int) -> ThreadPoolExecutor:
    """A pool for as long as the process; a forked one has no threads of its parent's."""
    return pool(count, "fastssl-embed")


def side_by_side(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    """`call(module, part)` of every part, concatenated; on as many threads as torch and this machine allow.

    Args:
        module: in evaluation mode. Each thread calls a copy around the same tensors; one that cannot be copied is
            called by this thread alone, with a SlowWarning.
        call: draws nothing and changes nothing.
        parts: on the CPU; their sizes alone decide the bits.
    """
    count = min(torch.get_num_threads(), cores().count, len(parts))
    modules = copies(module, count) if count > 1 else [module]
    if len(modules) == 1:
        return torch.cat([call(module, part) for part in parts])
    free = SimpleQueue[nn.Module]()
    for one in modules:
        free.put(one)

    def called(part: Tensor) -> Tensor:
        mine = free.get()
        try:
            return call(mine, part)
        finally:
            free.put(mine)

    return torch.cat(list(lasting_pool(count, os.getpid()).map(called, parts)))


def copies(module: nn.Module, count: int) -> list[nn.Module]:
    """The module and `count - 1` copies of it around the same tensors; itself alone where it cannot be copied."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    try:
        return [module, *(copy.deepcopy(module, dict(tensors)) for _ in range(count - 1))]
    except (TypeError, RuntimeError) as error:
        why = f"{type(module).__name__} cannot be copied ({error})"
        warnings.warn(f"{why}: one thread embeds instead of {count}.", SlowWarning, stacklevel=3)
        return [module]
