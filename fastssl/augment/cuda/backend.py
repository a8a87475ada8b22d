"""The CUDA backend: a fused Triton kernel that reads whole pixels and writes the network's layout once.

A view that fits one tile is done in one pass. A larger one takes up to three more, over a scratch copy, because
rotation, contrast and blur need all of the view; a policy without them needs the first pass alone.

B batch, V views, C channels, S side of a view, T side of a tile, G tiles of a view.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.augment import draws as hashing
from fastssl.augment.backend import BackendName, Images, Output
from fastssl.augment.cuda.color import colored, finish, gray_sum_before_contrast, unit
from fastssl.augment.cuda.resample import (
    Plan,
    Weights,
    blur_axis,
    blurred_tile,
    crop_axis,
    load_planes,
    mixed,
    rotated,
    store_planes,
)
from fastssl.augment.draws import DrawKey
from fastssl.augment.policy import SLOTS, Column, Parameters, View, runs
from fastssl.augment.sampling import sample_params

TILE_PX = 32  # divides 96, 160 and 224
WHOLE_PX = 64  # a view up to this side is one tile
SCRATCH_BYTES = 64 << 20  # images go by in groups whose scratch is about the size of the L2 cache
HASH_BLOCK = 512


class Pass(IntEnum):
    """What one launch does; each view leaves after the last pass that it needs."""

    CROP = 0
    ROTATE = 1
    COLOR = 2
    BLUR = 3


# kernels see no other constants
COLUMN, PASS, WEIGHTS = tl.constexpr(Column), tl.constexpr(Pass), tl.constexpr(Weights)
COLUMNS = tl.constexpr(len(Column))
GOLDEN, FIRST, SECOND = (tl.constexpr(x) for x in (hashing.GOLDEN, hashing.FIRST, hashing.SECOND))
UNIT = tl.constexpr(hashing.UNIT)


def draws(key: DrawKey, *, views: int, slots: int) -> Tensor:
    """`fastssl.augment.draws.draws`: the same bits, in one launch."""
    seed, epoch, index_B, first_view = key
    out_BVS = index_B.new_empty((len(index_B), views, slots), dtype=torch.float32)
    words = [word if isinstance(word, Tensor) else index_B.new_full((), _signed(word)) for word in (seed, epoch)]
    count = out_BVS.numel()
    if count > 0:
        grid = (triton.cdiv(count, HASH_BLOCK),)
        _draw[grid](*words, index_B.contiguous(), out_BVS, count, first_view, views, slots, BLOCK=HASH_BLOCK)
    return out_BVS


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """The `Backend` of fused Triton kernels."""

    name: BackendName = "cuda"
    runs_in_thread: bool = False  # launches return at once, and a side stream overlaps them
    reads_in_place: bool = True

    def limit_threads(self, threads: int) -> None:
        """Nothing to limit: the work is the device's."""

    def sample_params(self, views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Parameters:
        return sample_params(views, draws(key, views=len(views), slots=SLOTS), sizes_B2)

    def apply(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        """No host sync; once it has run, a call can be captured in a CUDA graph. float32 views and uint16 images are
        computed with float32's precision, others pass through float16."""
        if isinstance(params, DrawKey):
            params = self.sample_params(views, params, images.sizes_B2)
        return _apply(images, params, views, output)


def _apply(images: Images, params: Parameters, views: tuple[View, ...], output: Output) -> Tensor:
    pixels, sizes_B2, offsets_B = images.pixels, images.sizes_B2, images.offsets_B
    batch, side, channels = len(sizes_B2), views[0].side_px, len(output.mean_C)
    out_VBSSC = torch.empty((len(views), batch, side, side, channels), dtype=output.dtype, device=pixels.device)
    exact = output.dtype == torch.float32 or pixels.dtype == torch.uint16
    norm_2C = _norm(output.mean_C, output.std_C, pixels.device)
    for first, last in runs(tuple((view.interpolation, view.hue_mode) for view in views)):
        plan = _plan(views[first:last], channels, pixels.dtype, exact)
        params_BVP = params.packed_BVP[:, first:last]
        for b in _groups(batch, plan):
            place, offsets = (pixels[b], None) if offsets_B is None else (pixels, offsets_B[b])
            group, out = params_BVP[b], out_VBSSC[first:last, b]
            _render(place, offsets, sizes_B2[b], group, views[first:last], norm_2C, out, plan)
    return out_VBSSC.permute(0, 1, 4, 2, 3)


@lru_cache(maxsize=64)
def _norm(mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, C), mean and 1 / std; kept, because a step must not copy constants to the device."""
    return torch.tensor([mean_C, [1 / std for std in std_C]], dtype=torch.float32, device=device)


def _signed(word: int) -> int:
    """The int64 with the same low 64 bits."""
    return (word + 2**63) % 2**64 - 2**63


def _plan(views: tuple[View, ...], channels: int, pixel: torch.dtype, exact: bool) -> Plan:
    side, rotates = views[0].side_px, any(view.rotate_p > 0 for view in views)
    contrasts = channels == 3 and any(view.jitter_p > 0 and view.contrast > 0 for view in views)
    whole = side <= WHOLE_PX and not rotates
    return Plan(
        views=len(views),
        channels=channels,
        side=side,
        tile=max(16, triton.next_power_of_2(side)) if whole else TILE_PX,
        whole=whole,
        waits=not whole and (rotates or contrasts),
        resize=int(Weights.BICUBIC if views[0].interpolation == "bicubic" else Weights.BILINEAR),
        linear_hue=views[0].hue_mode == "linear",
        white=torch.iinfo(pixel).max,
        exact=exact,
    )


def _groups(batch: int, plan: Plan) -> list[slice]:
    """Slices of about equal length whose scratch keeps within SCRATCH_BYTES."""
    bytes_each = plan.views * plan.side**2 * plan.channels * (4 if plan.exact else 2)
    count = 1 if plan.whole else -(-batch * bytes_each // SCRATCH_BYTES)
    step = max(1, -(-batch // max(1, count)))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def _render(
    images: Tensor,
    offsets_B: Tensor | None,
    sizes_B2: Tensor,
    params_BVP: Tensor,
    views: tuple[View, ...],
    norm_2C: Tensor,
    out_VBSSC: Tensor,
    plan: Plan,
) -> None:
    """Launch every pass that the policy can ask for over one group of images."""
    count, device = len(sizes_B2) * plan.views, images.device
    rotates = any(view.rotate_p > 0 for view in views)
    blurs = not plan.whole and any(view.blur_p > 0 for view in views)
    planes_X = (0 if plan.whole else count * plan.channels * plan.side**2,)
    scratch, turned = (
        torch.empty(planes_X if wanted else (0,), dtype=torch.float32 if plan.exact else torch.float16, device=device)
        for wanted in (True, rotates)
    )
    sums_NG = torch.empty((count, plan.across**2), dtype=torch.float32, device=device)
    passes = [Pass.CROP] + [Pass.ROTATE] * rotates + [Pass.COLOR] * plan.waits + [Pass.BLUR] * blurs
    flat = offsets_B is not None
    images = images.contiguous()
    for stage in passes:
        _pass[(sums_NG.numel() * (1 if plan.channels == 3 else plan.channels),)](
            images,
            sizes_B2 if offsets_B is None else offsets_B.contiguous(),
            sizes_B2.contiguous(),
            params_BVP.contiguous(),
            norm_2C,
            scratch,
            turned,
            sums_NG,
            out_VBSSC,
            len(sizes_B2),
            0 if flat else images.stride(0),
            0 if flat else images.stride(1),
            out_VBSSC.stride(0),
            STAGE=int(stage),
            FLAT=flat,
            P=plan,
            num_warps=plan.tile // 16,  # a tensor core's lines: more warps would repeat each other's work
            num_stages=1,  # loops are too short for a pipeline to fill
        )


@triton.jit
def _draw(seed, epoch, index, out, count, first_view, views, slots, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.load(index + i // (views * slots), mask=i < count, other=0)
    key = _child(_child(tl.zeros([], tl.uint64), tl.load(seed)), tl.load(epoch))
    key = _child(_child(_child(key, sample), first_view + i // slots % views), i % slots)
    tl.store(out + i, (key >> 40).to(tl.float32) * UNIT, mask=i < count)


@triton.jit
def _child(key, word):
    z = key + (word.to(tl.uint64) + 1) * GOLDEN
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["batch", "image_step", "pitch"])
def _pass(
    images,
    offsets,
    sizes,
    params,
    norm,
    scratch,
    turned,
    sums,
    out,
    batch,
    image_step,
    pitch,
    out_step,
    STAGE: tl.constexpr,
    FLAT: tl.constexpr,
    P: tl.constexpr,
):
    """One pass over one tile of one view; of one channel, where the channels are not colors.

    Args:
        images: the first pixel; image_step and pitch are elements between images and between rows.
        offsets: int64 (B,), where FLAT.
        sizes: int64 (B, 2).
        params: float32 (B, V, P).
        norm: float32 (2, C).
        scratch, turned: (B, V, C, S, S) in [0, 1]: the crop, later its colors; the rotated crop.
        sums: float32 (B, V, G), each tile's gray before contrast.
        out: (V, B, S, S, C); views are out_step apart.
    """
    G: tl.constexpr = P.across * P.across
    tile = tl.program_id(0) % G
    row = tl.program_id(0) // G % (P.views * batch)
    channel = tl.program_id(0) // (G * P.views * batch)
    b, v = (row // P.views).to(tl.int64), (row % P.views).to(tl.int64)
    y_T1 = (tile // P.across * P.tile + tl.arange(0, P.tile))[:, None]
    x_1T = (tile % P.across * P.tile + tl.arange(0, P.tile))[None, :]
    params += row * COLUMNS
    norm += channel
    sums += row * G
    scratch += (row.to(tl.int64) * P.channels + channel) * (P.side * P.side)
    turned += (row.to(tl.int64) * P.channels + channel) * (P.side * P.side)
    out += v * out_step + b * (P.side * P.side * P.channels) + channel
    if STAGE == PASS.value.CROP:
        images += channel + (tl.load(offsets + b) if FLAT else b * image_step)
        _crop(images, sizes + 2 * b, pitch, tile, y_T1, x_1T, params, norm, scratch, sums, out, FLAT, P)
    elif STAGE == PASS.value.ROTATE:
        _rotate(tile, y_T1, x_1T, params, scratch, turned, sums, P)
    elif STAGE == PASS.value.COLOR:
        _color(y_T1, x_1T, params, norm, scratch, turned, sums, out, P)
    else:
        _blur(y_T1, x_1T, params, norm, scratch, out, P)


@triton.jit
def _crop(
    images, sizes, pitch, tile, y_T1, x_1T, params, norm, scratch, sums, out, FLAT: tl.constexpr, P: tl.constexpr
):
    height, width = tl.load(sizes).to(tl.int32), tl.load(sizes + 1).to(tl.int32)
    if FLAT:
        pitch = width * P.channels
    y, x = crop_axis(y_T1, params, 0, height, P), crop_axis(x_1T, params, 1, width, P)
    red, green, blue = mixed(images, pitch, P.channels, 1, y, x, P.resize, P)
    white: tl.constexpr = 1 / P.white
    red, green, blue = unit(red * white), unit(green * white), unit(blue * white)  # bicubic overshoots
    odd = tl.load(params + COLUMN.value.TURNS).to(tl.int32) % 2 == 1
    down, right = tl.where(odd, 1, P.side), tl.where(odd, P.side, 1)
    if P.whole:
        if P.channels == 3:
            red, green, blue = colored(red, green, blue, 0.0, y_T1, x_1T, params, P)
        if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
            red, green, blue = blurred_tile(red, green, blue, params, P)
        finish(red, green, blue, y_T1, x_1T, down, right, params, norm, out, P)
    elif P.waits:
        store_planes(red, green, blue, y_T1, x_1T, down, right, scratch, P)
        if P.channels == 3:
            tl.store(sums + tile, gray_sum_before_contrast(red, green, blue, y_T1, x_1T, params, P))
    else:
        _go_on(red, green, blue, 0.0, y_T1, x_1T, down, right, params, norm, scratch, out, P)


@triton.jit
def _rotate(tile, y_T1, x_1T, params, scratch, turned, sums, P: tl.constexpr):
    if tl.load(params + COLUMN.value.ROTATE_DEG) != 0:
        red, green, blue = rotated(scratch, y_T1, x_1T, params, P)
        store_planes(red, green, blue, y_T1, x_1T, P.side, 1, turned, P)
        if P.channels == 3:
            tl.store(sums + tile, gray_sum_before_contrast(red, green, blue, y_T1, x_1T, params, P))


@triton.jit
def _color(y_T1, x_1T, params, norm, scratch, turned, sums, out, P: tl.constexpr):
    source = tl.where(tl.load(params + COLUMN.value.ROTATE_DEG) != 0, turned, scratch)
    red, green, blue = load_planes(source, y_T1, x_1T, P)
    mean = 0.0
    if P.channels == 3:
        part = tl.arange(0, P.parts)
        mean = tl.sum(tl.load(sums + part, mask=part < P.across * P.across, other=0)) / (P.side * P.side)
    _go_on(red, green, blue, mean, y_T1, x_1T, P.side, 1, params, norm, scratch, out, P)


@triton.jit
def _blur(y_T1, x_1T, params, norm, scratch, out, P: tl.constexpr):
    if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
        y, x = blur_axis(y_T1, params, P), blur_axis(x_1T, params, P)
        red, green, blue = mixed(scratch, P.side, 1, P.side * P.side, y, x, WEIGHTS.value.GAUSSIAN, P)
        finish(red, green, blue, y_T1, x_1T, P.side, 1, params, norm, out, P)


@triton.jit
def _go_on(red, green, blue, mean, y_T1, x_1T, down, right, params, norm, scratch, out, P: tl.constexpr):
    """Color a tile; a blur takes it up from the scratch copy, otherwise it is finished."""
    if P.channels == 3:
        red, green, blue = colored(red, green, blue, mean, y_T1, x_1T, params, P)
    if tl.load(params + COLUMN.value.BLUR_RADIUS_PX) > 0:
        store_planes(red, green, blue, y_T1, x_1T, down, right, scratch, P)
    else:
        finish(red, green, blue, y_T1, x_1T, down, right, params, norm, out, P)
