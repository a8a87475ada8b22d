"""Where images come from: one function opens them all, by name or by what lies at the path."""

from collections import Counter
from pathlib import Path

from fastssl.data.sources import base
from fastssl.data.sources.account import Account
from fastssl.data.sources.base import SPLITS, Indexed, Item, Source, Stream
from fastssl.data.sources.choices import Choices, refuse_idle
from fastssl.data.sources.guard import guarded
from fastssl.errors import UserError, option

__all__ = ["SPLITS", "Indexed", "Item", "Source", "Stream", "open_source"]

TORCHVISION = ("cifar10", "cifar100", "stl10")
NAMES = ("shapes", *TORCHVISION)
COLUMNS = ("a table of images", "image_column", "label_column")  # readers, with the choices that they take
SHARDS = ("a set of WebDataset shards", "image_key")
_SHAPES_COUNT = {"train": 20_000, "test": 2_000, "val": 2_000, "unlabeled": 20_000}


@guarded
def open_source(
    spec: str | Path,
    *,
    split: str = "train",
    root: Path | None = None,
    download: bool = False,
    seed: int = 0,
    count: int | None = None,
    side_px: int | None = None,
    choices: Choices | None = None,
) -> Source:
    """Open a source of images; nothing is decoded yet.

    Args:
        spec: shapes, cifar10, cifar100 or stl10; or the path of a folder (class sub-folders or flat), an archive
            of one (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip), WebDataset shards (a folder of .tar, or a
            `name-{000..012}.tar` pattern), .parquet, a Hugging Face data set saved to disk, .npz, .npy, .csv or
            .beton.
        split: train, test, val or unlabeled.
        root: folder with torchvision's files; ~/.cache/fastssl when None.
        download: allowed to fetch torchvision's files when they are absent.
        seed, count, side_px: of the shapes, and of nothing else.
        choices: columns, keys and class names, where the usual ones do not fit.

    Raises:
        UserError: when there is no such source or split, or options are given that this kind of source has no use for.
    """
    if not isinstance(spec, str | Path):
        raise UserError(
            f"The source of images is a {type(spec).__name__}, not a path.",
            "Name a folder or a file; save an array as .npy, (N, H, W, C), first.",
        )
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}.", f"Set split to one of: {', '.join(SPLITS)}.")
    choices, kind = choices or Choices(), f"the source {spec}"
    idle = {
        "count": count is not None and str(spec) != "shapes",
        "root": root is not None and str(spec) not in TORCHVISION,
    }
    refuse_idle(kind, *(f"{option(name)} (data.{name} in a recipe)" for name, is_idle in idle.items() if is_idle))
    if str(spec) in NAMES:
        choices.taken_by(kind)
    if str(spec) == "shapes":
        from fastssl.data.sources.tables import shapes_source

        return shapes_source(
            split, seed=seed, count=_SHAPES_COUNT[split] if count is None else count, side_px=side_px or 32
        )
    if str(spec) in NAMES:
        from fastssl.data.sources.torchvision_files import torchvision_source

        return torchvision_source(str(spec), split, root=root, download=download)
    return _open_path(Path(spec).expanduser(), split, choices)


def _open_path(path: Path, split: str, choices: Choices) -> Source:
    """Choose the reader by what lies at the path."""
    from fastssl.data.sources import archives, arrays, columns, lists, tables, tar, webdataset

    shards = webdataset.shard_paths(path)
    if path.is_dir():
        return _open_folder(path, split, shards, choices)
    if not shards[0].exists():
        raise UserError(
            f"There is no file, folder or known source {str(path)!r}.",
            f"Give an existing path or one of: {', '.join(NAMES)}.",
        )
    path = shards[0] if len(shards) == 1 else path  # which a range of one shard means
    name = path.name.lower()
    if len(shards) > 1 or (name.endswith(tar.TAR_SUFFIXES) and webdataset.is_webdataset(path)):
        base.check_whole(path, split)
        return webdataset.webdataset_source(shards, split, choices.taken_by(*SHARDS), name=str(path))
    if name.endswith(tar.TAR_SUFFIXES):
        return archives.tar_source(path, split, choices.taken_by("an archive of images"))
    match path.suffix.lower():
        case ".zip":
            return archives.zip_source(path, split, choices.taken_by("an archive of images"))
        case ".parquet":
            base.check_whole(path, split)
            return columns.parquet_source([path], split, choices.taken_by(*COLUMNS), name=str(path))
        case ".npz":
            choices.taken_by("an .npz file")
            return arrays.npz_source(path, split)
        case ".npy":
            base.check_whole(path, split)
            choices.taken_by("an .npy file")
            return arrays.npy_source(path)
        case ".csv" | ".tsv":
            return lists.csv_source(path, split, choices.taken_by("a list of paths", *COLUMNS[1:], "image_root"))
        case ".beton":
            base.check_whole(path, split)
            return tables.beton_source(path, split, choices.taken_by("a .beton file", "label_column"))
    raise UserError(
        f"Unsupported file type: {path}.",
        "Give a folder, .tar, .tar.gz, .tar.xz, .zip, .parquet, .npz, .npy, .csv or .beton.",
    )


def _open_folder(path: Path, split: str, shards: list[Path], choices: Choices) -> Source:
    """Choose the reader by what lies in the folder; a folder that two readers would take is refused."""
    from fastssl.data.sources import columns, folders, webdataset

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return columns.arrow_source(path, split, choices.taken_by(*COLUMNS))
    parquet = base.visible(path, "**/*.parquet")
    if not parquet and not shards:
        return folders.folder_source(path, split, choices.taken_by("a folder of images"))
    firsts = {"Parquet files": next(iter(parquet), None), "tar files": next(iter(shards), None)}
    readings = firsts | {"image files": next(folders.walk(path, Account(), {}), None)}
    several = [f"{what} ({Path(first).name})" for what, first in readings.items() if first]
    if len(several) > 1:
        raise UserError(
            f"{path} can be read in {len(several)} ways: {' or '.join(several)}.",
            "Give the one that you mean, a file or a folder that holds nothing else, or move the others away.",
        )
    outside = Counter[str]() if parquet else webdataset.other_archives(path, shards)
    chosen = base.files_of_split(parquet or shards, split, path, outside)
    if parquet:
        source = columns.parquet_source(chosen, split, choices.taken_by(*COLUMNS), name=str(path))
    else:
        webdataset.check_shards(path, chosen)
        source = webdataset.webdataset_source(chosen, split, choices.taken_by(*SHARDS), name=str(path))
    source.account.outside.update(outside)
    return source
