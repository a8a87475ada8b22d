"""The CUDA backend: fused Triton kernels that read whole pixels and write the network's layout once.

One launch draws the parameters. A view that fits one tile is then done in one pass; a larger one takes up to three
more, over a scratch copy, because rotation, contrast and blur need all of the view.

B batch, V views, C channels, S side of a view.
"""

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fastssl.augment.backend import BackendName, Images, Output
from fastssl.augment.constants import RGB
from fastssl.augment.cuda.params import extend, sample
from fastssl.augment.cuda.passes import run_pass
from fastssl.augment.cuda.plan import Pass, Plan, Weights
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import Column, Parameters, View, runs

# divides 96, 160 and 224, so that no tile reaches past their edges
TILE_PX = 32
# a view up to this side is one tile; in float32 one of 64 px spills its registers
WHOLE_PX, WHOLE_EXACT_PX = 64, 32
# images go by in groups whose scratch is about the size of the L2 cache
SCRATCH_BYTES = 80 << 20
# groups are whole multiples of so many images: no odd one out at the end of a batch of 2^n
GROUP = 16
# chosen by the occupancy that the compiler's registers leave (bench/results/cuda_kernels.json)
WARPS = {Pass.ROTATE: 8, Pass.COLOR: 8, Pass.BLUR: 4}


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """The `Backend` of fused Triton kernels."""

    name: BackendName = "cuda"
    runs_in_thread: bool = False  # launches return at once, and a side stream overlaps them
    reads_in_place: bool = True

    def limit_threads(self, threads: int) -> None:
        """Nothing to limit: the work is the device's."""

    def sample_params(self, views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Parameters:
        """In one launch."""
        with _current(sizes_B2.device):
            return Parameters(sample(views, key, sizes_B2)[..., : len(Column)])

    def apply(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        """No host sync; once it has run, a call can be captured in a CUDA graph. float32 views and uint16 images are
        computed with float32's precision, others pass through float16."""
        with _current(images.pixels.device):
            return self._made(images, params, views, output)

    def _made(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        sizes_B2, side, channels = images.sizes_B2, views[0].side_px, len(output.mean_C)
        rows_BVP = sample(views, params, sizes_B2) if isinstance(params, DrawKey) else extend(params)
        # channels last in memory, as convolutions read fastest; the strides returned say (V, B, C, S, S)
        shape = (len(views), len(sizes_B2), side, side, channels)
        out_VBSSC = torch.empty(shape, dtype=output.dtype, device=images.pixels.device)
        # float16 holds pixels of 8 bits exactly, but not those of 16
        exact = output.dtype == torch.float32 or images.pixels.dtype == torch.uint16
        norm_2C = _norm(output.mean_C, output.std_C, images.pixels.device)
        # interpolation and hue mode are compiled in, so only views that share them share launches
        for first, last in runs(tuple((view.interpolation, view.hue_mode) for view in views)):
            some = views[first:last]
            plan = _plan(some, channels, images.pixels.dtype, exact)
            _render(images, rows_BVP[:, first:last], norm_2C, out_VBSSC[first:last], _passes(some, plan), plan)
        return out_VBSSC.permute(0, 1, 4, 2, 3)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors are on; its interpreter has no device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache(maxsize=64)
def _norm(mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, C), mean and 1 / std; kept, because a step must not copy constants to the device."""
    return torch.tensor([mean_C, [1 / std for std in std_C]], dtype=torch.float32, device=device)


def _plan(views: tuple[View, ...], channels: int, pixel: torch.dtype, exact: bool) -> Plan:
    side, rotates = views[0].side_px, any(view.rotate_p > 0 for view in views)
    contrasts = channels == RGB and any(view.jitter_p > 0 and view.contrast > 0 for view in views)
    # a rotation gathers from all over the view, which registers do not allow
    whole = side <= (WHOLE_EXACT_PX if exact else WHOLE_PX) and not rotates
    # a product takes 16 lines at least
    tile = max(16, triton.next_power_of_2(side)) if whole else TILE_PX
    across = -(-side // tile)
    return Plan(
        views=len(views),
        channels=channels,
        side=side,
        tile=tile,
        pixels=tile**2,
        across=across,
        # tl.arange takes powers of 2 only
        parts=triton.next_power_of_2(across**2),
        whole=whole,
        waits=not whole and (rotates or contrasts),
        resize=int(Weights.BICUBIC if views[0].interpolation == "bicubic" else Weights.BILINEAR),
        linear_hue=views[0].hue_mode == "linear",
        white=torch.iinfo(pixel).max,
        exact=exact,
    )


def _passes(views: tuple[View, ...], plan: Plan) -> list[Pass]:
    """Every pass that the policy can ask for."""
    rotates = any(view.rotate_p > 0 for view in views)
    blurs = not plan.whole and any(view.blur_p > 0 for view in views)
    return [Pass.CROP] + [Pass.ROTATE] * rotates + [Pass.COLOR] * plan.waits + [Pass.BLUR] * blurs


def _groups(batch: int, plan: Plan) -> list[range]:
    """The batch in parts of about equal length whose scratch keeps to about SCRATCH_BYTES."""
    bytes_each = plan.views * plan.side**2 * plan.channels * (4 if plan.exact else 2)
    count = 1 if plan.whole else max(1, -(-batch * bytes_each // SCRATCH_BYTES))
    step = batch if count == 1 else -(-batch // count // GROUP) * GROUP or GROUP
    return [range(b, min(b + step, batch)) for b in range(0, batch, max(1, step))]


def _render(
    images: Images, rows_BVP: Tensor, norm_2C: Tensor, out_VBSSC: Tensor, passes: list[Pass], plan: Plan
) -> None:
    """Launch the passes over one group of images after another."""
    pixels, groups = images.pixels.contiguous(), _groups(len(images.sizes_B2), plan)
    # channels that are no colors never meet, so each has programs of its own
    flat, channel_programs = images.offsets_B is not None, 1 if plan.channels == RGB else plan.channels
    most = max((len(group) for group in groups), default=0) * plan.views
    planes = 0 if plan.whole else most * plan.channels * plan.side**2
    kind = torch.float32 if plan.exact else torch.float16
    scratch = torch.empty(planes, dtype=kind, device=pixels.device)
    # not in place: other tiles still read what one has turned
    turned = torch.empty(planes if Pass.ROTATE in passes else 0, dtype=kind, device=pixels.device)
    sums_NG = torch.empty((most, plan.across**2), dtype=torch.float32, device=pixels.device)
    for group in groups:
        programs = len(group) * plan.views * plan.across**2 * channel_programs
        for stage in passes:
            run_pass[(programs,)](
                pixels,
                # without offsets any int64 pointer does: it is never read
                images.sizes_B2 if images.offsets_B is None else images.offsets_B.contiguous(),
                images.sizes_B2,
                images.sizes_B2.stride(0),
                rows_BVP,
                rows_BVP.stride(0),
                norm_2C,
                scratch,
                turned,
                sums_NG,
                out_VBSSC,
                group.start,
                len(group),
                0 if flat else pixels.stride(0),
                0 if flat else pixels.stride(1),
                out_VBSSC.stride(0),
                STAGE=int(stage),
                FLAT=flat,
                P=plan,
                # a warp for every 16 lines, as a tensor core takes them: more would repeat each other's work
                num_warps=WARPS.get(stage, plan.tile // 16),
                # loops are too short for a pipeline to fill
                num_stages=1,
            )
