"""How an image is prepared for a backbone: as `convert` prepared those of training. One function, one description.

H W height and width in pixels, C channels, S side of the view.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastssl.data.convert.prepare import Shape, fit, scale_range
from fastssl.data.decode import decode, parse_color, to_channels
from fastssl.data.manifest import Manifest
from fastssl.errors import UserError

OPTIONS = ("side_px", "max_side_px", "dtype", "stretch", "background", "max_pixels")
# the largest centered square of `image`, as left, top, right and bottom
_BOX = (
    "box = [(image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2, "
    "(image.width + min(image.size)) / 2, (image.height + min(image.size)) / 2]"
)


def options_of(manifest: Manifest) -> dict[str, Any]:
    """The options of `convert` that made the images of training what they are, but for its defaults."""
    options = {"channels": manifest.channels} | {key: manifest.options.get(key) for key in OPTIONS}
    return {key: value for key, value in options.items() if value not in (None, getattr(Shape(), key))}


def shape_of(manifest: Manifest) -> Shape:
    """How the images of training were converted; others have to come the same way."""
    options = options_of(manifest)
    background = {"background": parse_color(options["background"])} if "background" in options else {}
    return Shape(**options | background)


def read(path: str | Path, shape: Shape) -> np.ndarray:
    """The upright image of a file, decoded as `convert` does it, in the channels of the training images.

    Raises:
        UserError: when the file is absent or is no readable image.
    """
    try:
        data = Path(path).read_bytes()
        decoded = decode(
            data, key=str(path), channels=shape.channels, max_pixels=shape.max_pixels, background=shape.background
        )
    except OSError as error:
        raise UserError(f"images: {path} cannot be read: {error.strerror}.", "Check the path.") from error
    except ValueError as error:
        raise UserError(f"images: {error}.", "Leave it out, or give another file.") from error
    return decoded.image_HWC


def prepare_pixels(image_HWC: np.ndarray, shape: Shape) -> np.ndarray:
    """Decoded pixels as `convert` stores them before any JPEG; the same array where nothing has to change.

    Args:
        image_HWC: uint8 or uint16.
        shape: of the data that the backbone was trained on.

    Raises:
        ValueError: for a number of channels that cannot be turned into the backbone's.
    """
    return fit(scale_range(to_channels(image_HWC, shape.channels, key="an image"), shape), shape)


def steps(shape: Shape, side_px: int) -> list[str]:
    """What is done to an upright image, in words."""
    words = []
    if shape.background:
        words.append(f"transparent pixels over the color rgb{shape.background}")
    if shape.stretch:
        words.append(f"16-bit images: values of 0 to {shape.stretch} stretched to the whole range, larger ones cut")
    elif shape.dtype == "uint8":
        words.append("16-bit images: 65535 becomes 255, rounded")
    if shape.side_px:
        words.append(f"largest centered square, which may begin at half a pixel, to {shape.side_px} px (bicubic)")
    elif shape.max_side_px:
        words.append(f"longer side to at most {shape.max_side_px} px (bicubic)")
    if shape.side_px != side_px:
        words.append(
            f"largest centered square, at the nearest whole pixel (of two the even one), to {side_px} px (bilinear)"
        )
    return [*words, f"pixels divided by {np.iinfo(shape.dtype).max}, to [0, 1]", "minus mean, divided by std"]


def code(shape: Shape, side_px: int, *, mean: list[float], std: list[float]) -> list[str]:
    """The same as lines of Python, from a file `path` to `images`, float32 (1, C, S, S).

    None for other than 8-bit gray or color, which Pillow does not resize, and none for stretched images of 16 bits,
    whose color Pillow reads as 8 bits.
    """
    if shape.dtype != "uint8" or shape.channels not in (1, 3) or shape.stretch:
        return []
    gray = shape.channels == 1
    below = [
        'image = image.convert("RGBA")',
        f'image = Image.alpha_composite(Image.new("RGBA", image.size, {shape.background}), image)',
    ]
    lines = [
        "import numpy as np",
        "from PIL import Image, ImageOps",
        "image = ImageOps.exif_transpose(Image.open(path))",
        'if image.mode.startswith("I"):  # gray of 16 bits, which convert would cut at 255',
        "    image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 510 + 65535) // 131070).astype(np.uint8))",
        *(below if shape.background else []),
        f'image = image.convert("{"L" if gray else "RGB"}")',
        *(['image = image.convert("F")  # floating point: one rounding at the end of a resize'] if gray else []),
    ]
    if shape.side_px:
        lines += [_BOX, f"image = image.resize(({shape.side_px}, {shape.side_px}), Image.Resampling.BICUBIC, box=box)"]
    elif shape.max_side_px:
        lines += [
            f"scale = min(1, {shape.max_side_px} / max(image.size))",
            "size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))",
            "image = image.resize(size, Image.Resampling.BICUBIC)",
        ]
    if gray and (shape.side_px or shape.max_side_px):
        lines += ["image = Image.fromarray(np.rint(np.asarray(image)).clip(0, 255))"]
    lines += [f"pixels = np.asarray(image, np.float32).reshape(image.height, image.width, {shape.channels})"]
    if shape.side_px != side_px:
        resize = f"resize(({side_px}, {side_px}), Image.Resampling.BILINEAR)"
        lines += [
            "short, left, top = min(image.size), *(round((side - min(image.size)) / 2) for side in image.size)",
            "pixels = pixels[top : top + short, left : left + short]",
            "planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels.transpose(2, 0, 1)]",
            f"pixels = np.stack([np.asarray(plane.{resize}) for plane in planes], axis=2)",
        ]
    return [
        *lines,
        f"mean, std = np.float32({mean}), np.float32({std})",
        "images = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]",
    ]


def preprocessing(manifest: Manifest, *, side_px: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Size, mean, std, and what to do with an image, in words and as code: the record that every export carries."""
    shape = shape_of(manifest)
    return {
        "channels": shape.channels,
        "dtype": shape.dtype,
        "side_px": side_px,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic" if shape.side_px == side_px else "bilinear",
        "layout": "float32 (N, C, H, W)",
        "steps": steps(shape, side_px),
        "code": code(shape, side_px, mean=mean, std=std),
    }
