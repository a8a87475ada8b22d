"""torch as a new process has it, whatever the caller has set: what trains, loads or evaluates does not depend on it."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """While entered, gradients are on, new tensors are float32 and on the CPU, and nothing is cast; a decorator too."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if device.type != "cpu":  # only then: it costs a little at every operator
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
