"""Clocks: an untimed warm-up comes first, rivals take turns, and every measurement waits for the device."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from fastssl.build import hardware

Step = Callable[[], int]


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all it was given."""
    return partial(hardware.wait, device)


class Laps:
    """Seconds between calls, each after waiting for the device, by name."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.seconds = wait, dict[str, float]()
        wait()
        self.mark = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Ends a lap; laps of one name add up."""
        self.wait()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.mark
        self.mark = now


def side_by_side(
    steps: Mapping[str, Step], *, wait: Callable[[], None], window_s: float, rounds: int
) -> dict[str, list[float]]:
    """Items per second of each, one value a round. They take turns, so that a slow spell of the machine touches all.

    Args:
        steps: each does one step and returns how many items it made.
        wait: for the device.
        window_s: of one measurement; one step at least. The warm-up before takes as long, and two steps at least.
        rounds: n.
    """
    for step in steps.values():
        step()
        rate(step, wait, window_s)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            rates[name].append(rate(step, wait, window_s))
    return rates


def rate(step: Step, wait: Callable[[], None], window_s: float) -> float:
    """Items per second over a window. On an accelerator the step only queues work, so the window ends with a wait."""
    wait()
    start, items = time.perf_counter(), 0
    while not items or time.perf_counter() - start < window_s:
        items += step()
    wait()
    return items / (time.perf_counter() - start)
