"""The next batch's views while this step runs: on CUDA a side stream makes them; elsewhere they are made when asked.

The kernels of a step and of the next views do not depend on each other, so the device runs them together and a step
waits for neither loading nor augmentation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.data.batch import Batch

Groups = tuple[Tensor, ...]


def views_ahead(batches: Iterator[Batch], views: Callable[[Batch], Groups], device: torch.device) -> Iterator[Groups]:
    """The views of each batch, in order.

    Args:
        batches: on the device; closed when the iteration ends.
        views: batch to one (V_g, B, C, H, W) tensor per side length, without waiting for the device.
        device: of the network.
    """
    try:
        yield from on_side_stream(batches, views, device) if device.type == "cuda" else map(views, batches)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def on_side_stream(
    batches: Iterator[Batch], views: Callable[[Batch], Groups], device: torch.device
) -> Iterator[Groups]:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def launch() -> tuple[Groups, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            return None if batch is None else (views(batch), side.record_event())

    waiting = launch()
    while waiting is not None:
        groups, made = waiting
        current = torch.cuda.current_stream(device)
        current.wait_event(made)
        for group in groups:
            group.record_stream(current)  # its memory is the side stream's: not to be reused before this step is done
        waiting = launch()
        yield groups
