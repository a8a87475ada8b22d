"""torch's global switches for the length of a run, put back afterwards."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fastssl.recipe import Recipe


@contextlib.contextmanager
def torch_settings(recipe: Recipe) -> Iterator[None]:
    """TF32 for what stays float32 on CUDA, deterministic kernels, and cuDNN's search, as the recipe says."""
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    deterministic = recipe.train.deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    put(("high" if recipe.train.tf32 else "highest", recipe.train.tf32, not deterministic, deterministic))
    try:
        yield
    finally:
        put(before)


def put(values: tuple[str, bool, bool, bool]) -> None:
    precision, cudnn_tf32, search, deterministic = values
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = search
    torch.use_deterministic_algorithms(deterministic)
