"""A steady training step brings no number to the host: the operators that would are counted, and CUDA refuses them.

What waits for the device on an accelerator is an operator like any other on the CPU (.item(), nonzero, an index by a
mask), so it can be seen without one.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.bench.parts import Parts, parts
from fastssl.recipe.load import load

# Their results' values or shapes must be known on the host.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
WAITING |= {"unique_consecutive", "unique_dim", "repeat_interleave", "bincount", "allclose"}

SETTINGS: dict[str, list[str]] = {
    "barlow_twins": [],
    "vicreg": ["loss.name=vicreg"],
    "sigreg": ["loss={name: sigreg}"],
    "four views": ["augment.views=4"],
    "every operation": [
        "augment.preset=imagenet_asymmetric",
        "augment.all={rotate_p: 0.5, rotate_max_deg: 30, cutout_p: 0.5, posterize_p: 0.5, quarter_turn_p: 0.5}",
    ],
    "multi-crop": ["augment.preset=multicrop", "augment.views=4", "augment.small_side_px=8"],
    "clipped and accumulated": ["optim.clip_norm=1.0", "optim.accumulate_steps=2"],
    "lars": ["optim.name=lars"],
    "authors' form": ["loss.form=authors", "loss.l2_normalize=true", "loss.standardize=joint"],
    "bf16": ["train.precision=bf16"],
}


class Waits(TorchDispatchMode):
    """Counts the operators that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put_", "index_put") else ()
        by_mask = any(place is not None and place.dtype == torch.bool for place in places)
        if name in WAITING or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def made(tiny_recipe: dict[str, Any], changes: list[str], device: str) -> Parts:
    # The torch backend is what an accelerator runs, or Triton's equal in operators outside the kernels.
    backend = "torch" if device == "cpu" else "auto"
    recipe = load(tiny_recipe, [f"device={device}", f"augment.backend={backend}", *changes])
    return parts(recipe)


def one_step(it: Parts, batches: Any) -> torch.Tensor:
    batch, epoch = next(batches)
    return it.step(it.views(batch, epoch))["loss"]


def test_what_waits_is_seen():
    with Waits() as waits:
        x = torch.ones(3)
        x.sum().item()
        float(x[0])
        x.nonzero()
        bool(x.any())
        x[x > 0]
        x[x > 0] = 1.0
    assert waits.seen["_local_scalar_dense"] == 3
    assert waits.seen["nonzero"] == 1
    assert waits.seen["index"] == waits.seen["index_put_"] == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_steady_step_asks_for_no_number(tiny_recipe: dict[str, Any], setting: str):
    it = made(tiny_recipe, SETTINGS[setting], "cpu")
    batches = it.batches()
    one_step(it, batches)
    with Waits() as waits:
        loss = one_step(it, batches)
    assert not waits.seen
    assert torch.isfinite(loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_steady_step_on_cuda_is_never_synchronized(tiny_recipe: dict[str, Any], setting: str):
    it = made(tiny_recipe, SETTINGS[setting], "cuda")
    batches = it.batches()
    for _ in range(3):  # kernels are compiled and tuned
        one_step(it, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = one_step(it, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
