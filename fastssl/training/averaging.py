"""Averaged weights: an exponential moving average of the network, which probes, evaluation and exports take."""

import copy

import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.models.pretrainer import Pretrainer


class Average:
    """A copy of a network that follows it: `average = decay * average + (1 - decay) * network` after every step.

    The first step copies the network, so that random initial weights have no share. Running statistics of batch norm
    are averaged as the weights are, since they belong to them; counters (integers) are copied.

    Args:
        network: the one that is trained.
        decay: in (0, 1); about 1 / (1 - decay) steps are averaged over.

    Raises:
        UserError: for a network that cannot be copied.
    """

    def __init__(self, network: Pretrainer, *, decay: float) -> None:
        try:
            self.network = copy.deepcopy(network).requires_grad_(False)
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"optim.ema averages in a copy of the network, and it cannot be copied: {error}.",
                "Set optim.ema to null, or give the backbone a __deepcopy__.",
            ) from error
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: Pretrainer) -> None:
        """Takes a step's weights in. Nothing waits for the device."""
        average, current = tensors(self.network), tensors(network)
        floats = [i for i, tensor in enumerate(average) if tensor.is_floating_point()]
        if self.steps and floats:
            torch._foreach_lerp_([average[i] for i in floats], [current[i] for i in floats], 1 - self.decay)
        exact = [i for i in range(len(average)) if not self.steps or not average[i].is_floating_point()]
        if exact:
            torch._foreach_copy_([average[i] for i in exact], [current[i] for i in exact])
        self.steps += 1


def tensors(network: Pretrainer) -> list[Tensor]:
    """Parameters and buffers, in the module's order."""
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
