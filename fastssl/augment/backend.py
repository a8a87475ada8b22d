"""What a backend is: it turns draws into parameters, and (uint8 images, parameters) into views.

Three objects with this one interface agree pixel by pixel: torch (any device), cpu (fused numba), cuda (fused Triton).

B batch, V views, C channels, H W of an image.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import Parameters, View

BackendName = Literal["torch", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a batch.

    Attributes:
        pixels: uint8 or uint16 (B, H, W, C), or a flat buffer with `offsets_B`.
        sizes_B2: int64 height and width of each image, at most H and W.
        offsets_B: int64 first element of each image in the flat buffer, or None.
    """

    pixels: Tensor
    sizes_B2: Tensor
    offsets_B: Tensor | None


@dataclass(frozen=True, slots=True)
class Output:
    """How views leave: normalized by mean_C and std_C, in [0, 1] units of the image's full range, as `dtype`."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    dtype: torch.dtype


class Backend(Protocol):
    """One way to make views.

    Attributes:
        name: of the recipe's `augment.backend`.
        runs_in_thread: its work releases Python's lock, so a thread can make the next views during a step.
        reads_in_place: it reads images wherever they lie in a flat buffer without waiting for the device.
    """

    @property
    def name(self) -> BackendName: ...

    @property
    def runs_in_thread(self) -> bool: ...

    @property
    def reads_in_place(self) -> bool: ...

    def limit_threads(self, threads: int) -> None:
        """What the calling thread makes from now on uses so many threads at most."""

    def sample_params(self, views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Parameters:
        """What `apply` with the same key does: the policy's V rows from `key.first` on.

        Args:
            sizes_B2: int64 height and width in pixels of each image.
        """
        ...

    def apply(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        """Cut and transform views of one side length.

        Args:
            params: of these views, or the key to draw them by.
            views: V rows of equal side_px.

        Returns:
            views_VBCHW: `output.dtype`, normalized; its flattened form (V * B, C, H, W) is channels_last.
        """
        ...


def backend_of(name: BackendName) -> Backend:
    """The backend of that name.

    Raises:
        ImportError: where Triton (cuda) is not installed.
    """
    match name:
        case "torch":
            from fastssl.augment.torch_ops import TorchBackend

            return TorchBackend()
        case "cpu":
            from fastssl.augment.cpu.backend import CpuBackend  # numba takes half a second to import

            return CpuBackend()
        case "cuda":
            from fastssl.augment.cuda.backend import CudaBackend  # Triton exists on Linux only

            return CudaBackend()
        case _:
            assert_never(name)
