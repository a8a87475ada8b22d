"""Arrays of images in .npy, mapped, and in .npz, inflated one image at a time."""

import itertools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastssl.data.sources.account import Account
from fastssl.data.sources.base import SPLITS, Indexed, Item, MissingSplitError, Stream, check_whole, no_labels
from fastssl.data.sources.labels import number_labels, read_labels
from fastssl.errors import UserError

_IMAGES_OF_SPLIT = ("{}_images", "images_{}", "x_{}", "X_{}", "{}_x", "{}_data")
_LABELS_OF_SPLIT = ("{}_labels", "labels_{}", "y_{}", "Y_{}", "{}_y", "{}_targets")
_IMAGES = ("images", "image", "x", "X", "data", "arr_0")
_USUAL_CHANNELS = (1, 3, 4)
_LABELS = ("labels", "label", "y", "Y", "targets", "arr_1")


def npy_source(path: Path) -> Indexed:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) of uint8 or uint16, mapped, without labels."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(images, np.ndarray):
        raise UserError(f"{path} is no .npy file.", "Save it with numpy.save, as uint8 or uint16.")
    axes = _axes(images.shape, images.dtype, path)
    labels_N = no_labels(len(images))
    return Indexed(str(path), (), labels_N, lambda i: Item(f"{path.name}[{i}]", _as_hwc(images[i], axes)))


def npz_source(path: Path, split: str) -> Stream:
    """Images and labels of an .npz under one of their usual names, one image at a time.

    Names: `train_images`, `x_train`, ... for a split, `images`, `x`, `data`, `arr_0` for a file of one split; the
    same for labels. A label array of (N, 1) will do; its numbers are the classes.
    """
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    image_key, label_key = _npz_keys(path, names, split)
    with _npz_member(path, image_key) as file:
        shape, _, dtype = _npy_header(file, path)
    axes = _axes(shape, dtype, path)
    classes: tuple[str, ...] = ()
    labels_N = no_labels(shape[0])
    if label_key is not None and split != "unlabeled":
        with np.load(path, allow_pickle=False) as arrays:
            labels = _labels(path, label_key, arrays[label_key])
            keys = {_npz_keys(path, names, word)[1] for word in _npz_splits(names) if word != "unlabeled"}
            others = [_labels(path, key, arrays[key]) for key in keys if key is not None and key != label_key]
            classes, labels_N = number_labels(labels, itertools.chain.from_iterable(others))
        if len(labels_N) != shape[0]:
            raise UserError(f"{path} has {shape[0]} images and {len(labels_N)} labels.", "Save one label per image.")

    def items() -> Iterator[Item]:
        with _npz_member(path, image_key) as file:
            (count, *inner), _, dtype = _npy_header(file, path)
            size = int(np.prod(inner)) * dtype.itemsize
            for i in range(count):
                data = file.read(size)
                if len(data) != size:
                    raise UserError(f"{path} is cut short at image {i}.", "Save it again.")
                pixels = _as_hwc(np.frombuffer(data, dtype).reshape(inner), axes)
                yield Item(f"{path.name}[{i}]", pixels, int(labels_N[i]))

    return Stream(
        str(path),
        classes,
        shape[0],
        items,
        account=Account(columns=tuple(sorted(names)), image_from=image_key, label_from=label_key),
    )


def _labels(path: Path, key: str, values: np.ndarray) -> list[int | str]:
    """Labels of an array of numbers or text, (N,) or (N, 1)."""
    if values.ndim > 2 or (values.ndim == 2 and values.shape[1] != 1):
        raise UserError(f"{path}: {key} has shape {values.shape}, not one label per image.", "Save it as (N,).")
    labels, bad = read_labels(values.reshape(-1).tolist())
    if bad:
        raise UserError(
            f"{path}: {len(bad)} values of {key} are no labels, first {bad[0][1]}.", "Save class numbers or names."
        )
    return labels


def _npz_keys(path: Path, names: set[str], split: str) -> tuple[str, str | None]:
    """Names of the images' array and of the labels' for one split."""
    splits = _npz_splits(names)
    if splits:
        image_key = _first(names, _IMAGES_OF_SPLIT, split)
        if image_key is None:
            raise MissingSplitError(str(path), split, splits)
        return image_key, _first(names, _LABELS_OF_SPLIT, split)
    image_key = _first(names, _IMAGES, split)
    if image_key is None:
        raise UserError(
            f"{path} has no array of images, only {', '.join(sorted(names)) or 'nothing'}.",
            f"Name it {split}_images, or images.",
        )
    check_whole(path, split)
    return image_key, _first(names, _LABELS, split)


def _npz_splits(names: set[str]) -> list[str]:
    return [word for word in SPLITS if _first(names, _IMAGES_OF_SPLIT, word)]


def _first(names: set[str], patterns: tuple[str, ...], split: str) -> str | None:
    wanted = (pattern.format(word) for pattern in patterns for word in SPLITS[split])
    return next((key for key in wanted if key in names), None)


@contextmanager
def _npz_member(path: Path, key: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(key + ".npy") as file:
        yield file


def _npy_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = reader(file)
    if is_fortran:
        raise UserError(f"{path} holds images in column order.", "Save numpy.ascontiguousarray of them.")
    return shape, is_fortran, dtype


def _axes(shape: tuple[int, ...], dtype: np.dtype, path: Path) -> tuple[int, ...]:
    """How to turn one image of the array to (H, W, C): an order of axes, (0, 1) for gray without channels."""
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise UserError(f"{path} holds {dtype}, not uint8 or uint16.", "Scale to 0..255 and save as uint8.")
    if len(shape) == 3:
        return (0, 1)
    if len(shape) == 4:
        return (1, 2, 0) if _is_channels_first(shape, path) else (0, 1, 2)
    raise UserError(f"{path} has shape {shape}.", "Save images as (N, H, W), (N, H, W, C) or (N, C, H, W).")


def _is_channels_first(shape: tuple[int, ...], path: Path) -> bool:
    """Whether (N, a, b, c) is (N, C, H, W): a usual number of channels decides, else a square, else the smaller end."""
    _, first, middle, last = shape
    if (first in _USUAL_CHANNELS) != (last in _USUAL_CHANNELS):
        return first in _USUAL_CHANNELS
    if (first == middle) != (middle == last):
        return middle == last
    if first == last:
        raise UserError(
            f"{path} has shape {shape}, of which either end may be the channels.", "Save images as (N, H, W, C)."
        )
    return first < last


def _as_hwc(image: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(image[..., None] if len(axes) == 2 else image.transpose(axes))
