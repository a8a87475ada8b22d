"""CIFAR-10, CIFAR-100 and STL-10 from the files that torchvision keeps, under the same names and checksums.

STL-10 is mapped, not loaded: its unlabeled part is 2.8 GB.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.sources.base import Indexed, Item, MissingSplitError
from fastssl.errors import UserError, option

DEFAULT_ROOT = Path("~/.cache/fastssl")
_STL10_SIDE_PX = 96


def torchvision_source(name: str, split: str, *, root: Path | None, download: bool) -> Indexed:
    """Images of cifar10, cifar100 (train, test) or stl10 (train, test, unlabeled), uint8 (H, W, 3).

    Args:
        root: folder that holds, or shall hold, torchvision's files; ~/.cache/fastssl when None.
        download: whether to fetch them when they are absent or damaged.
    """
    root = (root or DEFAULT_ROOT).expanduser()
    if name == "stl10":
        return _stl10(split, root, download)
    if split not in ("train", "test"):
        raise MissingSplitError(name, split, ("train", "test"))
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    with _fetching(name, kind, root, download):
        data = kind(str(root), train=split == "train", download=download)
    return _arrays(name, tuple(data.classes), np.array(data.targets, np.int64), data.data.__getitem__)


def _stl10(split: str, root: Path, download: bool) -> Indexed:
    if split == "val":
        raise MissingSplitError("stl10", split, ("train", "test", "unlabeled"))
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    kind = datasets.STL10
    stem = "unlabeled" if split == "unlabeled" else split
    wanted = [entry for entry in kind.train_list + kind.test_list if entry[0].startswith(stem)]
    folder = root / kind.base_folder
    with _fetching("stl10", kind, root, download):
        if not all(check_integrity(folder / file, md5) for file, md5 in wanted):
            if not download:
                raise RuntimeError("absent")
            download_and_extract_archive(kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5)
    planes = np.memmap(folder / f"{stem}_X.bin", np.uint8, mode="r")
    images_NCWH = planes.reshape(-1, 3, _STL10_SIDE_PX, _STL10_SIDE_PX)  # columns first, as MATLAB stores them
    classes = tuple((folder / kind.class_names_file).read_text().split()) if split != "unlabeled" else ()
    if split == "unlabeled":
        labels_N = np.full(len(images_NCWH), -1, np.int64)
    else:
        labels_N = np.fromfile(folder / f"{stem}_y.bin", np.uint8).astype(np.int64) - 1
    return _arrays("stl10", classes, labels_N, lambda i: np.ascontiguousarray(images_NCWH[i].transpose(2, 1, 0)))


def _arrays(
    name: str, classes: tuple[str, ...], labels_N: NDArray[np.int64], pixels: Callable[[int], np.ndarray]
) -> Indexed:
    return Indexed(name, classes, labels_N, lambda i: Item(f"{name}[{i}]", pixels(i), int(labels_N[i])))


@contextmanager
def _fetching(name: str, kind: type, root: Path, download: bool) -> Iterator[None]:
    """Turn what torchvision raises for absent files and failing networks into a sentence and a remedy."""
    url, filename, folder = kind.url, kind.filename, kind.base_folder  # type: ignore[attr-defined]
    by_hand = f"Download {url} elsewhere and put {filename}, or its unpacked folder {folder}, into {root}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's own, about numpy and pickle
            yield
    except Exception as error:
        if download:
            what = f"{name} cannot be downloaded to {root}: {' '.join(str(error).split())[:200].rstrip('.')}."
            raise UserError(what, by_hand + ".") from error
        raise UserError(
            f"{name} is not in {root}, or not all of it.",
            f"Allow it with {option('download', True)}, in a recipe with data.download, or: "
            f"{by_hand[0].lower()}{by_hand[1:]}.",
        ) from error
