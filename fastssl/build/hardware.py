"""The recipe's device and precision."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from llvmlite import binding  # type: ignore[import-untyped]

from fastssl.build import ranks
from fastssl.errors import UserError
from fastssl.recipe.schema import Recipe

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Precision, torch.dtype | None] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
# LLVM's names of instructions that multiply numbers of this type, on x86 and ARM
CPU_FEATURES: dict[Precision, tuple[str, ...]] = {
    "bf16": ("avx512bf16", "amx-bf16", "bf16"),
    "fp16": ("avx512fp16", "amx-fp16", "fullfp16"),
    "fp32": (),
}


def device(recipe: Recipe) -> torch.device:
    """The recipe's device; auto prefers cuda, then mps, then cpu.

    Raises:
        UserError: when it is asked for and absent, or there are more ranks on a machine than GPUs.
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
    if name != "cuda":
        return torch.device(name)
    if ranks.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"Rank {ranks.local_rank()} of this machine has no GPU: torch finds {torch.cuda.device_count()}.",
            "Start as many processes as there are GPUs (--nproc-per-node), or set device to cpu.",
        )
    return torch.device(name, ranks.local_rank())


def precision(recipe: Recipe, on: torch.device | None = None) -> Precision:
    """What matrix products are computed in: the recipe's, or what suits the device.

    Args:
        recipe: asks for one, or for auto.
        on: the device; the recipe's when None.
    """
    if recipe.train.precision != "auto":
        return recipe.train.precision
    on = device(recipe) if on is None else on
    if is_native("bf16", on):
        return "bf16"
    return "fp16" if on.type == "cuda" else "fp32"


def is_native(name: Precision, on: torch.device) -> bool:
    """Whether a device has instructions for products of this precision; without them it converts each operand."""
    match on.type:
        case "cuda":
            return name != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            features = binding.get_host_cpu_features()
            return any(features.get(feature, False) for feature in CPU_FEATURES[name]) or name == "fp32"
        case _:
            return name != "bf16"


def autocast(recipe: Recipe) -> torch.dtype | None:
    """The dtype of a training's matrix products, None for float32."""
    return DTYPES[precision(recipe)]


def features_autocast(recipe: Recipe, on: torch.device) -> torch.dtype | None:
    """The dtype of matrix products when features are computed: as in training where the device can, else float32."""
    name = precision(recipe, on)
    return DTYPES[name] if is_native(name, on) else None


def emulation(recipe: Recipe, on: torch.device) -> str | None:
    """One sentence when the precision asked for is emulated by this CPU, else None."""
    if on.type != "cpu" or is_native(precision(recipe, on), on):
        return None
    return (
        f"This CPU emulates {recipe.train.precision}, which is many times slower: "
        "set train.precision to auto or fp32 in a new run."
    )


def replaced(recipe: Recipe, on: torch.device) -> str | None:
    """One sentence when features are computed in float32 in place of the run's precision, else None."""
    name = precision(recipe, on)
    if is_native(name, on):
        return None
    return f"Features are computed in float32: this {on.type} has no instructions for {name}, in which the run trained."


@contextlib.contextmanager
def seeded(seed: int, on: torch.device) -> Iterator[None]:
    """torch's global random numbers begin at a seed for a while; the caller's go on afterwards as if nothing was."""
    with torch.random.fork_rng([on] if on.type == "cuda" else []):
        reseed(seed, on)
        yield


def reseed(seed: int, on: torch.device) -> None:
    """torch's global random numbers begin at a seed on the CPU and that device; torch.manual_seed's do on all."""
    torch.default_generator.manual_seed(seed)
    match on.type:
        case "cuda":
            with torch.cuda.device(on):
                torch.cuda.manual_seed(seed)
        case "mps":
            torch.mps.manual_seed(seed)


def seed_of_step(seed: int, step: int) -> int:
    """Of what a network draws in a step (dropout), so that a resume draws the same; far from that of other seeds."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


def wait(device: torch.device) -> None:
    """Returns when the device has done all it was given."""
    match device.type:
        case "cuda":
            torch.cuda.synchronize(device)
        case "mps":
            torch.mps.synchronize()


def graph_hindrance(recipe: Recipe, device: torch.device) -> str:
    """What keeps the device from replaying the recipe's steps as one graph; empty where nothing does."""
    if device.type != "cuda":
        return f"on {device.type}"
    if ranks.world() > 1:
        return "with several ranks"
    if precision(recipe) == "fp16":
        return "in fp16, whose gradients the host looks at"
    return ""
