"""What a step hands to the network: parts of a batch that lie in memory as the whole does."""

from typing import Any

import pytest
import torch
from tiny import one_torch_thread

from fastssl.bench.parts import parts
from fastssl.recipe.load import load


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_parts_of_a_batch_reach_the_network_channels_last(
    tiny_recipe: dict[str, Any], accumulate_steps: int, backend: str
) -> None:
    with one_torch_thread():
        made = parts(load(tiny_recipe, [f"optim.accumulate_steps={accumulate_steps}", f"augment.backend={backend}"]))
        batch, epoch = next(made.batches())
        views = made.views(batch, epoch)
        found = made.train_step.parts(views)
    assert len(found) == accumulate_steps
    for part in found:
        images_NCHW = part[0].flatten(0, 1)
        assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
        assert images_NCHW.data_ptr() == part[0].data_ptr()  # nothing is copied again
    assert torch.equal(torch.cat([part[0] for part in found], dim=1), views[0])
