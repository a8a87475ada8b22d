"""The reference backend: plain batched torch, any device, no host sync.

A crop, its resize and both flips are one matrix per axis, so resampling is two batched matrix products. This
is the readable statement of what the fused kernels must reproduce. It compiles as one graph:
`torch.compile(augment, fullgraph=True, dynamic=False)`, static because the policy's numbers are part of the
graph.

B batch, V views, C channels, S side of a view, H W of the source, K taps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.augment.backend import BackendName, Images, Output
from fastssl.augment.constants import GRAY_WEIGHTS, RGB, RGB_TO_YIQ, YIQ_TO_RGB
from fastssl.augment.draws import DrawKey, draws
from fastssl.augment.policy import (
    JITTER_ORDERS,
    SLOTS,
    Column,
    Parameters,
    View,
    blur_radius_px,
    constant,
    runs,
)
from fastssl.augment.sampling import sample_params

TINY = 1e-12


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """The `Backend` of plain torch operators."""

    name: BackendName = "torch"
    runs_in_thread: bool = False  # each of its many operators takes Python's lock again
    reads_in_place: bool = False  # it copies the images out of a flat buffer, and waits for the device to do so

    def limit_threads(self, threads: int) -> None:
        """Nothing to limit: torch's own threads serve."""

    def sample_params(self, views: tuple[View, ...], key: DrawKey, sizes_B2: Tensor) -> Parameters:
        device = sizes_B2.device
        if device.type == "mps":  # no float64 there
            sizes_B2, key = sizes_B2.cpu(), key._replace(index_B=key.index_B.cpu())
        params = sample_params(views, draws(key, views=len(views), slots=SLOTS), sizes_B2)
        return Parameters(params.packed_BVP.to(device))

    def apply(self, images: Images, params: Parameters | DrawKey, views: tuple[View, ...], output: Output) -> Tensor:
        if isinstance(params, DrawKey):
            params = self.sample_params(views, params, images.sizes_B2)
        with torch.no_grad(), torch.autocast(images.pixels.device.type, enabled=False):
            return _apply(images, params, views, output)


def _apply(images: Images, params: Parameters, views: tuple[View, ...], output: Output) -> Tensor:
    pixels, sizes_B2, mean_C = images.pixels, images.sizes_B2, output.mean_C
    if images.offsets_B is not None:
        pixels = padded(pixels, sizes_B2, images.offsets_B, len(mean_C))
    image_BCHW = pixels.permute(0, 3, 1, 2).float() / torch.iinfo(pixels.dtype).max
    parts_BVCSS = [
        _views(image_BCHW, sizes_B2, params.rows(first, last), views[first], mean_C) for first, last in runs(views)
    ]
    view_BVCSS = parts_BVCSS[0] if len(parts_BVCSS) == 1 else torch.cat(parts_BVCSS, dim=1)
    mean_C11 = constant(mean_C, torch.float32, pixels.device)[:, None, None]
    std_C11 = constant(output.std_C, torch.float32, pixels.device)[:, None, None]
    pixels_VBSSC: Tensor = ((view_BVCSS - mean_C11) / std_C11).to(output.dtype).permute(1, 0, 3, 4, 2)
    return pixels_VBSSC.contiguous().permute(0, 1, 4, 2, 3)


def padded(flat: Tensor, sizes_B2: Tensor, offsets_B: Tensor, channels: int) -> Tensor:
    """A flat buffer as (B, H, W, C), H and W those of the largest image."""
    height, width = sizes_B2.amax(dim=0).tolist()
    row_H = torch.arange(height, device=flat.device)[:, None, None]
    column_W = torch.arange(width, device=flat.device)[:, None]
    channel_C = torch.arange(channels, device=flat.device)
    pitch_B111 = (sizes_B2[:, 1] * channels)[:, None, None, None]
    position_BHWC = offsets_B[:, None, None, None] + row_H * pitch_B111 + column_W * channels + channel_C
    return flat[position_BHWC.clamp(max=flat.numel() - 1)]


def _views(image_BCHW: Tensor, sizes_B2: Tensor, params: Parameters, view: View, mean_C: tuple[float, ...]) -> Tensor:
    """One run of equal rows: (B, V, C, S, S) in [0, 1], in the policy's order."""
    x = _cropped(image_BCHW, sizes_B2, params, view)
    if view.quarter_turn_p > 0:
        x = _quarter_turned(x, params)
    if view.rotate_p > 0:
        x = _rotated(x, params)
    if image_BCHW.shape[1] == RGB:
        x = _colored(x, params, view)
    if view.blur_p > 0:
        x = _blurred(x, params, view)
    if view.solarize_p > 0:
        x = torch.where(x >= _wide(params, Column.SOLARIZE), 1 - x, x)
    if view.posterize_p > 0:
        x = _posterized(x, params)
    if view.cutout_p > 0:
        x = _cut_out(x, params, mean_C)
    return x


def _wide(params: Parameters, column: Column) -> Tensor:
    """A column as (B, V, 1, 1, 1)."""
    return params[column][..., None, None, None]


def _cropped(image_BCHW: Tensor, sizes_B2: Tensor, params: Parameters, view: View) -> Tensor:
    height, width = image_BCHW.shape[-2:]
    rows_BVSH = _resampling(
        params[Column.TOP], params[Column.HEIGHT], params[Column.VFLIP], sizes_B2[:, 0], view, height
    )
    columns_BVSW = _resampling(
        params[Column.LEFT], params[Column.WIDTH], params[Column.HFLIP], sizes_B2[:, 1], view, width
    )
    half_BVCHS = image_BCHW[:, None] @ columns_BVSW.transpose(-1, -2)[:, :, None]
    x = rows_BVSH[:, :, None] @ half_BVCHS
    return x.clamp(0, 1)  # bicubic overshoots


def _resampling(
    start_BV: Tensor, length_BV: Tensor, flip_BV: Tensor, size_B: Tensor, view: View, extent: int
) -> Tensor:
    """Weights (B, V, S, extent) of every source pixel in every view pixel, along one axis.

    torchvision's antialiased resize: a triangle or Keys' cubic, as wide as the pixels it must cover, over the
    box's norm. What the box holds outside the image is black: it counts in the norm and weighs nothing.
    """
    cubic, pad = view.interpolation == "bicubic", view.side_px if view.crop == "none" else view.pad_px
    scale_BV = length_BV / view.side_px
    reach_BV = scale_BV.clamp(min=1)
    out_S = torch.arange(view.side_px, device=start_BV.device)
    out_BVS = torch.where(flip_BV[..., None] > 0, view.side_px - 1 - out_S, out_S)
    center_BVS1 = ((out_BVS + 0.5) * scale_BV[..., None])[..., None]
    source_X = torch.arange(-pad, extent + pad, device=start_BV.device)
    place_BVX = source_X - start_BV[..., None]
    distance_BVSX = (place_BVX[:, :, None] + 0.5 - center_BVS1) / reach_BV[..., None, None]
    weight_BVSX = _keys(distance_BVSX) if cubic else (1 - distance_BVSX.abs()).clamp(min=0)
    inside_BVX = (place_BVX >= 0) & (place_BVX < length_BV[..., None])
    weight_BVSX = weight_BVSX * inside_BVX[:, :, None]
    weight_BVSX = weight_BVSX / weight_BVSX.sum(dim=-1, keepdim=True)
    real_BX = (source_X >= 0) & (source_X < size_B[:, None])
    return (weight_BVSX * real_BX[:, None, None])[..., pad : pad + extent]


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, what torch uses when it antialiases."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _quarter_turned(x: Tensor, params: Parameters) -> Tensor:
    turns = _wide(params, Column.TURNS)
    for k in (1, 2, 3):
        x = torch.where(turns == k, torch.rot90(x, k, (-2, -1)), x)
    return x


def _rotated(x: Tensor, params: Parameters) -> Tensor:
    """Counterclockwise about the center, bilinear, black outside, as torchvision's rotate."""
    degrees_BV = params[Column.ROTATE_DEG]
    angle_BV = torch.deg2rad((degrees_BV.cpu() if degrees_BV.device.type == "mps" else degrees_BV).double())
    cos_BV, sin_BV = (value_BV.float().to(x.device) for value_BV in (angle_BV.cos(), angle_BV.sin()))
    zero_BV = torch.zeros_like(cos_BV)
    theta_BV6 = torch.stack((cos_BV, -sin_BV, zero_BV, sin_BV, cos_BV, zero_BV), dim=-1)
    images, shape = x.flatten(0, 1), x.shape
    grid = F.affine_grid(theta_BV6.view(-1, 2, 3), list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where(_wide(params, Column.ROTATE_DEG) != 0, turned.view(shape), x)


def gray(x: Tensor) -> Tensor:
    """Luminance of (..., 3, H, W): (..., 1, H, W)."""
    red, green, blue = x.unbind(dim=-3)
    return (red * GRAY_WEIGHTS[0] + green * GRAY_WEIGHTS[1] + blue * GRAY_WEIGHTS[2]).unsqueeze(-3)


def _colored(x: Tensor, params: Parameters, view: View) -> Tensor:
    if view.jitter_p > 0:
        orders = constant(JITTER_ORDERS, torch.int64, x.device)
        order_BV4 = orders[params[Column.ORDER].long()]
        for step in range(4):
            order = _order_at(order_BV4[..., step, None, None, None], step, view)
            x = _jitter_step(x, order, params, view)
    if view.gray_p > 0:
        x = torch.where(_wide(params, Column.GRAY) > 0, gray(x), x)
    return x


def _order_at(order_BV111: Tensor, step: int, view: View) -> Tensor | int:
    return step if view.jitter_order == "fixed" else order_BV111


def _jitter_step(x: Tensor, operation: Tensor | int, params: Parameters, view: View) -> Tensor:
    """Operation 0, 1 or 2: blend with black, the mean gray, or the pixel's gray; 3: shift the hue."""
    if isinstance(operation, int):
        return _hue_shifted(x, params, view) if operation == 3 else _blend(x, operation, params)
    blends = [torch.where(operation == k, _blend(x, k, params), 0.0) for k in range(3)]
    hue = torch.where(operation == 3, _hue_shifted(x, params, view), 0.0)
    return blends[0] + blends[1] + blends[2] + hue


def _blend(x: Tensor, operation: int, params: Parameters) -> Tensor:
    factor = _wide(params, (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION)[operation])
    if operation == 0:
        return (x * factor).clamp(0, 1)
    base = gray(x).mean(dim=(-2, -1), keepdim=True) if operation == 1 else gray(x)
    return (x * factor + (1 - factor) * base).clamp(0, 1)


def _hue_shifted(x: Tensor, params: Parameters, view: View) -> Tensor:
    if view.hue == 0:
        return x
    shift = _wide(params, Column.HUE)
    shifted = _hsv_turned(x, shift) if view.hue_mode == "hsv" else _yiq_turned(x, shift)
    return torch.where(shift != 0, shifted, x)


def _hsv_turned(x: Tensor, shift: Tensor) -> Tensor:
    """torchvision's adjust_hue without its table: each channel is the value less its share of the chroma."""
    red, green, blue = (x.narrow(-3, k, 1) for k in range(3))
    low, high = torch.aminmax(x, dim=-3, keepdim=True)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = torch.remainder(sixth + 6 * shift, 6)
    shares = ((sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs())
    return low + chroma * torch.cat(shares, dim=-3).clamp(0, 1)


def _yiq_turned(x: Tensor, shift: Tensor) -> Tensor:
    """The chroma plane of YIQ turned by the angle: linear, so hues near the gamut's edge are clipped."""
    red, green, blue = (x.narrow(-3, k, 1) for k in range(3))
    luma, i, q = (r * red + g * green + b * blue for r, g, b in RGB_TO_YIQ)
    cos, sin = (2 * math.pi * shift).cos(), (2 * math.pi * shift).sin()
    i, q = cos * i - sin * q, sin * i + cos * q
    return torch.cat([luma + of_i * i + of_q * q for _, of_i, of_q in YIQ_TO_RGB], dim=-3).clamp(0, 1)


def _blurred(x: Tensor, params: Parameters, view: View) -> Tensor:
    """Separable Gaussian, the border reflected; each sample's kernel ends at its own radius."""
    reach = blur_radius_px(view.blur_sigma_max_px, view.side_px)
    offset_K = torch.arange(-reach, reach + 1, device=x.device)
    sigma_BV1 = params[Column.BLUR_SIGMA_PX][..., None].clamp(min=TINY)
    weight_BVK = torch.exp(-0.5 * (offset_K / sigma_BV1).square())
    weight_BVK = weight_BVK * (offset_K.abs() <= params[Column.BLUR_RADIUS_PX][..., None])
    weight_BVK = weight_BVK / weight_BVK.sum(dim=-1, keepdim=True)
    place_X = torch.arange(-reach, view.side_px + reach, device=x.device).abs()
    reflected_X = place_X - 2 * (place_X - view.side_px + 1).clamp(min=0)
    for axis in (-2, -1):
        wide = x.index_select(axis, reflected_X)
        x = torch.zeros_like(x)
        for k in range(2 * reach + 1):
            x = x + wide.narrow(axis, k, view.side_px) * weight_BVK[..., k, None, None, None]
    return x


def _posterized(x: Tensor, params: Parameters) -> Tensor:
    bits = _wide(params, Column.POSTERIZE_BITS)
    levels = torch.exp2(bits)
    kept = torch.minimum((x * levels).floor(), levels - 1) / levels
    return torch.where(bits > 0, kept, x)


def _cut_out(x: Tensor, params: Parameters, mean_C: tuple[float, ...]) -> Tensor:
    """The square takes the mean, which normalizes to 0."""
    side = x.shape[-1]
    place_S = torch.arange(side, device=x.device)
    top, left, square = (_wide(params, c) for c in (Column.CUTOUT_TOP, Column.CUTOUT_LEFT, Column.CUTOUT_SIDE))
    in_rows = (place_S[:, None] >= top) & (place_S[:, None] < top + square)
    in_columns = (place_S >= left) & (place_S < left + square)
    return torch.where(in_rows & in_columns, constant(mean_C, torch.float32, x.device)[:, None, None], x)
