"""The recipe's device and precision."""

import torch

from fastssl.build import ranks
from fastssl.errors import UserError
from fastssl.recipe.schema import Recipe


def device(recipe: Recipe) -> torch.device:
    """The recipe's device; auto prefers cuda, then mps, then cpu.

    Raises:
        UserError: when it is asked for and absent.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if recipe.device == "auto":
        name = next(name for name in ("cuda", "mps", "cpu") if available[name])
    elif available[recipe.device]:
        name = recipe.device
    else:
        raise UserError(
            f"device is {recipe.device}, but torch finds none on this machine.", "Set device to auto or cpu."
        )
    return torch.device(name, ranks.local_rank()) if name == "cuda" else torch.device(name)


def autocast(recipe: Recipe) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[recipe.train.precision]


def wait(device: torch.device) -> None:
    """Returns when the device has done all it was given."""
    match device.type:
        case "cuda":
            torch.cuda.synchronize(device)
        case "mps":
            torch.mps.synchronize()
