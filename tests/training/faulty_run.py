"""`cause(FAULT, STEP)`: the process has one fault at one step.

FAULT: nan (the loss), hang (the loss never returns), memory (the address space ends), sigterm-step, sigterm-evaluation
and sigterm-checkpoint (the signal arrives in the middle of each), two-signals (Ctrl-C twice within a step).
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl import build
from fastssl.probes import evaluate
from fastssl.runs import files


def at_step(step: int, honest: Callable[..., Any], fault: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, whose result `fault` may change at the call of that number."""
    calls = 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = honest(*arguments, **options)
        return fault(result) if calls == step else result

    return function


def not_a_number(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**terms, "loss": terms["loss"] * float("nan")}


def hang_in_the_loss(terms: Any) -> Any:
    while True:
        time.sleep(1)


def sigterm(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return result


def ctrl_c_twice(result: Any) -> Any:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    return result


def no_more_memory(terms: Any) -> Any:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    torch.empty(256 << 20, dtype=torch.uint8).fill_(1)
    return terms


def cause(name: str, step: int) -> None:
    """The fault comes at its step of whatever this process does next."""
    if name == "sigterm-evaluation":
        evaluate.knn = at_step(step, evaluate.knn, sigterm)
    elif name == "sigterm-checkpoint":
        files.sync = at_step(step, files.sync, sigterm)
    else:
        faults = {"nan": not_a_number, "hang": hang_in_the_loss, "memory": no_more_memory}
        faults |= {"sigterm-step": sigterm, "two-signals": ctrl_c_twice}
        honest = build.losses.loss
        build.losses.loss = lambda recipe: at_step(step, honest(recipe), faults[name])
