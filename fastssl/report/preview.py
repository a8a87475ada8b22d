"""What a recipe's augmentation does to real images: their views with the drawn parameters, and a sheet per operation.

The pictures come from the recipe's own loader, draws and backend, so they are what the network sees, before
normalization. B images, V views.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl import build
from fastssl.augment.augment import Augment
from fastssl.augment.backend import backend_of
from fastssl.augment.policy import NO_SOLARIZE, Column, View
from fastssl.data.batch import Batch
from fastssl.errors import UserError, option
from fastssl.recipe.schema import Recipe, ViewSpec
from fastssl.runs.files import atomic_path

Picture = npt.NDArray[np.uint8]
CELL_PX, GAP_PX, LINE_PX = 112, 10, 13
FONT = ImageFont.load_default()
# Each operation at four strengths: changes to a row that otherwise does nothing.
OPERATIONS: dict[str, tuple[dict[str, object], ...]] = {
    "random resized crop": tuple(
        {"crop": "random_resized", "area_min": a, "area_max": a} for a in (0.8, 0.4, 0.2, 0.08)
    ),
    "pad and crop": tuple({"crop": "pad", "pad_px": p} for p in (2, 4, 8, 12)),
    "flips and turns": (
        {"hflip_p": 1.0},
        {"vflip_p": 1.0},
        {"quarter_turn_p": 1.0},
        {"rotate_p": 1.0, "rotate_max_deg": 180.0},
    ),
    "brightness": tuple({"jitter_p": 1.0, "brightness": x} for x in (0.2, 0.4, 0.6, 0.8)),
    "contrast": tuple({"jitter_p": 1.0, "contrast": x} for x in (0.2, 0.4, 0.6, 0.8)),
    "saturation": tuple({"jitter_p": 1.0, "saturation": x} for x in (0.2, 0.4, 0.6, 0.8)),
    "hue": tuple({"jitter_p": 1.0, "hue": x} for x in (0.05, 0.1, 0.25, 0.5)),
    "hue, linear": tuple({"jitter_p": 1.0, "hue": x, "hue_mode": "linear"} for x in (0.05, 0.1, 0.25, 0.5)),
    "grayscale": ({"gray_p": 1.0},),
    "gaussian blur": tuple(
        {"blur_p": 1.0, "blur_sigma_min_px": s, "blur_sigma_max_px": s} for s in (0.5, 1.0, 2.0, 4.0)
    ),
    "solarize": tuple({"solarize_p": 1.0, "solarize_threshold": t} for t in (0.8, 0.6, 0.5, 0.3)),
    "posterize": tuple({"posterize_p": 1.0, "posterize_bits": b} for b in (6, 4, 2, 1)),
    "cutout": tuple({"cutout_p": 1.0, "cutout_fraction": f} for f in (0.1, 0.25, 0.5, 0.75)),
}


def check_out(out: Path) -> None:
    """Refuses a target that is no .png."""
    if out.suffix.lower() != ".png":
        raise UserError(f"{option('out')} is {out}, but previews are PNG files.", "Give it the suffix .png.")


def preview(recipe: Recipe, out: Path, *, images: int = 6, epoch: int = 0) -> list[Path]:
    """Writes `out`, the views of some images, and `<out>-operations.png`, every operation at four strengths.

    Args:
        recipe: with a data file that exists.
        out: a .png.
        images: B, rows of the grid.
        epoch: whose draws to show.

    Returns:
        The two files.

    Raises:
        UserError: when the target cannot be written or the images do not have one or three channels.
    """
    check_out(out)
    manifest, device = build.data.manifest_of(recipe.data.path), torch.device("cpu")
    if manifest.channels not in (1, 3):
        raise UserError(f"The images have {manifest.channels} channels.", "Preview images with one or three channels.")
    chosen = build.data.some_of(torch.arange(manifest.count), images)
    batch = next(iter(build.data.ordered_loader(recipe, recipe.data.path, chosen, device=device).epoch(0)))
    augment = plain(build.views.augment_of_epoch(recipe, manifest, device=device)(epoch))
    operations = out.with_name(f"{out.stem}-operations.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheets = {out: view_grid(batch, augment, epoch=epoch), operations: operation_sheet(batch, augment)}
    try:
        for path, drawn in sheets.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with atomic_path(path) as temporary:
                drawn.save(temporary, "PNG")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}.", f"Choose another {option('out')}."
        ) from error
    return [out, operations]


def plain(augment: Augment) -> Augment:
    """The same policy without normalization, in float32, so that views are pictures again."""
    channels = len(augment.mean_C)
    return replace(
        augment, mean_C=(0.0,) * channels, std_C=(1.0,) * channels, dtype=torch.float32, backend=backend_of("torch")
    )


def view_grid(batch: Batch, augment: Augment, *, epoch: int) -> Image.Image:
    """One row per image: the image itself, then its views, each above its parameters."""
    sizes_B2 = batch.sizes_B2
    if sizes_B2 is None:
        sizes_B2 = torch.tensor(batch.images.shape[1:3]).expand(len(batch), 2)
    params_BVP = augment.sample_params(batch, epoch).packed_BVP
    views_VB = [view for group in pictures(augment, batch, epoch) for view in group]
    clean_B = pictures(only(augment, clean_row(batch, augment)), batch, 0)[0][0]
    rows = []
    for b in range(len(batch)):
        label = f"image {int(batch.index_B[b])}\n{int(sizes_B2[b, 1])} x {int(sizes_B2[b, 0])} px"
        cells = [(clean_B[b], label)]
        cells += [(view_B[b], words(params_BVP[b, v])) for v, view_B in enumerate(views_VB)]
        rows.append(cells)
    return sheet(rows)


def operation_sheet(batch: Batch, augment: Augment) -> Image.Image:
    """One row per operation: the first image untouched, then at each strength."""
    first = Batch(
        images=batch.images if batch.offsets_B is not None else batch.images[:1],
        labels_B=batch.labels_B[:1],
        index_B=batch.index_B[:1],
        sizes_B2=None if batch.sizes_B2 is None else batch.sizes_B2[:1],
        offsets_B=None if batch.offsets_B is None else batch.offsets_B[:1],
    )
    base = clean_row(first, augment)
    rows = []
    for name, strengths in OPERATIONS.items():
        views = (base, *(replace(base, **changes) for changes in strengths))  # type: ignore[arg-type]
        shown = [view for group in pictures(replace(augment, views=views), first, 0) for view in group]
        labels = [name, *("\n".join(f"{k.replace('_', ' ')} {v}" for k, v in changes.items()) for changes in strengths)]
        rows.append([(view[0], label) for view, label in zip(shown, labels, strict=True)])
    return sheet(rows)


def clean_row(batch: Batch, augment: Augment) -> View:
    return View(**ViewSpec(side_px=augment.views[0].side_px, crop="center").model_dump())


def only(augment: Augment, row: View) -> Augment:
    return replace(augment, views=(row,))


def pictures(augment: Augment, batch: Batch, epoch: int) -> list[list[list[Picture]]]:
    """uint8 (H, W, 3) pictures, by group of equal side, view and image."""
    groups = augment(batch, epoch)
    return [[[picture(image_CHW) for image_CHW in view_BCHW] for view_BCHW in group] for group in groups]


def picture(image_CHW: Tensor) -> Picture:
    pixels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def words(params_P: Tensor) -> str:
    """The parameters that change something, one in a line."""
    p = {column: float(params_P[column]) for column in Column}
    place = f"at {p[Column.LEFT]:.0f}, {p[Column.TOP]:.0f}"
    lines = [f"crop {p[Column.WIDTH]:.0f} x {p[Column.HEIGHT]:.0f}", place]
    lines += ["mirrored"] if p[Column.HFLIP] else []
    lines += ["upside down"] if p[Column.VFLIP] else []
    lines += [f"turned {90 * p[Column.TURNS]:.0f}°"] if p[Column.TURNS] else []
    lines += [f"rotated {p[Column.ROTATE_DEG]:.0f}°"] if p[Column.ROTATE_DEG] else []
    for column in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION):
        lines += [f"{column.name.lower()} x {p[column]:.2f}"] if p[column] != 1.0 else []
    lines += [f"hue {p[Column.HUE]:+.2f}"] if p[Column.HUE] else []
    lines += ["gray"] if p[Column.GRAY] else []
    lines += [f"blur {p[Column.BLUR_SIGMA_PX]:.1f} px"] if p[Column.BLUR_SIGMA_PX] else []
    lines += ["solarized"] if p[Column.SOLARIZE] < NO_SOLARIZE else []
    lines += [f"{p[Column.POSTERIZE_BITS]:.0f} bits"] if p[Column.POSTERIZE_BITS] else []
    lines += ["cutout"] if p[Column.CUTOUT_SIDE] else []
    return "\n".join(lines)


def sheet(rows: list[list[tuple[Picture, str]]]) -> Image.Image:
    """Labeled pictures in rows, enlarged without smoothing so that pixels can be seen; no label leaves its column."""
    labeled = [[(pixels, wrapped(label)) for pixels, label in cells] for cells in rows]
    heights = [CELL_PX + 2 * GAP_PX + LINE_PX * max(len(lines) for _, lines in cells) for cells in labeled]
    step_px = CELL_PX + GAP_PX
    canvas = Image.new("RGB", (GAP_PX + step_px * max(map(len, rows)), GAP_PX + sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), GAP_PX
    for cells, height in zip(labeled, heights, strict=True):
        for x, (pixels, lines) in enumerate(cells):
            left = GAP_PX + x * step_px
            canvas.paste(Image.fromarray(pixels).resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST), (left, top))
            for i, line in enumerate(lines):
                draw.text((left + 1, top + CELL_PX + 2 + i * LINE_PX), line, fill="black", font=FONT)
        top += height
    return canvas


def wrapped(label: str) -> list[str]:
    """The label's lines, broken between words where they are wider than a picture."""
    lines: list[str] = []
    for text in label.splitlines():
        line = ""
        for word in text.split(" "):
            longer = f"{line} {word}".strip()
            if line and FONT.getlength(longer) > CELL_PX - 2:  # a glyph may reach past its advance
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
