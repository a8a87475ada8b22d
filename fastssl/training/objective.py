"""Views to the loss's terms: what a step differentiates, also as one module that a compiler takes whole.

V views, B images, D embedding dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses.loss import Terms

Views = Sequence[Tensor]


def objective(
    network: Callable[[Views], Any],
    loss: Callable[..., Terms],
    groups: Views,
    *,
    autocast: torch.dtype | None,
    seed: Tensor | None = None,
) -> Terms:
    """The loss's terms of these views; "loss" carries the gradient.

    Args:
        network: groups of views to features and embeddings (V, B, D).
        loss: embeddings (V, B, D) to terms, outside autocast.
        groups: one (V_g, B, C, H, W) tensor per side length.
        autocast: dtype of the network's matrix products, or None for float32.
        seed: int64 scalar on the device for a loss that takes one.
    """
    kind, dtype = groups[0].device.type, autocast or torch.bfloat16
    with torch.autocast(kind, dtype=dtype, enabled=autocast is not None):
        _, z_VBD = network(groups)
    return loss(z_VBD) if seed is None else loss(z_VBD, seed=seed)


class Objective(nn.Module):
    """`objective` of a network and a loss: compiled or made data-parallel, both are in it."""

    def __init__(self, network: nn.Module, loss: Callable[..., Terms], *, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.loss, self.autocast = network, loss, autocast

    def forward(self, groups: Views, seed: Tensor | None = None) -> Terms:
        return objective(self.network, self.loss, groups, autocast=self.autocast, seed=seed)
