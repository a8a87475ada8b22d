"""What this machine can do at best, measured: a large matrix product in the recipe's precision, and a large copy."""

from collections.abc import Callable
from typing import Any

import torch

from fastssl.bench.record import row
from fastssl.bench.timing import side_by_side

SIDE = {"cuda": 8192, "cpu": 1536}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


def ceilings(
    device: torch.device, dtype: torch.dtype, *, wait: Callable[[], None], window_s: float = 0.5, rounds: int = 5
) -> list[dict[str, Any]]:
    """Rows of tflop_per_s (a multiply and an add are two) and gb_per_s (a byte read and written counts twice)."""
    side = SIDE.get(device.type, 4096)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(COPY_BYTES.get(device.type, 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def multiply() -> int:
        torch.mm(a, b, out=product)
        return 2 * side**3

    def copy() -> int:
        target.copy_(source)
        return 2 * len(source)

    rates = side_by_side({"matmul": multiply, "copy": copy}, wait=wait, window_s=window_s, rounds=rounds)
    kind = str(dtype).removeprefix("torch.")
    return [
        row("matmul", {"side": side, "dtype": kind}, "tflop_per_s", [value / 1e12 for value in rates["matmul"]]),
        row("copy", {"bytes": len(source)}, "gb_per_s", [value / 1e9 for value in rates["copy"]]),
    ]


def highest(rows: list[dict[str, Any]], impl: str) -> float:
    """A ceiling is the best of its repeats."""
    return next(float(row["max"]) for row in rows if row["impl"] == impl)
