"""Which images the probes learn from and which they are judged on. Choices are made on validation; test is explicit.

N images of a part.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastssl import build
from fastssl.data.convert import convert
from fastssl.data.manifest import Manifest, manifest_path
from fastssl.data.sources import NAMES
from fastssl.data.sources.base import MissingSplitError
from fastssl.errors import UserError, option
from fastssl.pretrained.load import Pretrained
from fastssl.pretrained.preparation import options_of
from fastssl.probes import evaluate as measures

OnError = Literal["fail", "skip"]
On = Literal["val", "test", "pretraining"]
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Part:
    """Labeled images of one file.

    Attributes:
        path: the .beton.
        rows_N: int64 positions in the file.
        labels_N: int64 classes.
        manifest: of the file.
        source, split: what the file was converted from for this evaluation, None for a .beton as given.
        remarks: what has to be said of the choice of images, a sentence each.
    """

    path: Path
    rows_N: Tensor
    labels_N: Tensor
    manifest: Manifest
    source: str | None = None
    split: str | None = None
    remarks: tuple[str, ...] = ()

    def pick(self, positions: Tensor) -> "Part":
        """The images at these positions of the part."""
        return replace(self, rows_N=self.rows_N[positions], labels_N=self.labels_N[positions])


def splits(
    net: Pretrained,
    *,
    data: str | Path | None,
    test: str | Path | None,
    on: On,
    folder: Path | None,
    on_error: OnError = "fail",
    download: bool = False,
) -> tuple[Part, Part]:
    """Images to learn from and to be judged on.

    Args:
        net: what is evaluated.
        data, test: files or sources of another data set; the run's own when both are absent.
        on: "val" judges on held-out labeled images of the first, "test" on the second.
        folder: where sources are converted to.
        on_error: "fail" or "skip" at images of a source that cannot be read.
        download: may a known data set that is absent be fetched?

    Raises:
        UserError: when a file is absent or unlabeled, or its classes or channels do not fit.
    """
    if test is not None and on == "val":
        raise UserError(
            f"{option('test')} names a test set, but the evaluation is on val.",
            f"Add {option('on', 'test')}, or leave out {option('test')}.",
        )
    read = partial(part_of, trained_on=net.manifest, folder=folder, on_error=on_error, download=download)
    own = "probe_path" if net.recipe.data.probe_path else "path"
    labeled = read(data, "train") if data is not None else labeled_part(own_file(net, own))
    tested = None
    if on == "test":
        tested_on = test_name(net, data, test)
        is_own = tested_on == net.recipe.data.test_path
        tested = (
            labeled_part(own_file(net, "test_path"))
            if is_own
            else test_part(tested_on, read, whole=not is_same(tested_on, data))
        )
    elif data is None and net.recipe.data.val_count:
        labels_N = build.data.labels_of(labeled.path)
        fit, held = build.data.labeled_parts(net.recipe, labels_N)
        known, left_out = build.data.of_known_classes(labels_N, fit, held)
        labeled, tested = (labeled.pick(torch.searchsorted(labeled.rows_N, rows)) for rows in (fit, known))
        tested = remarked(replace(tested, remarks=()), left_out)  # those of the file are said of what is learned from
    else:
        fit, held = measures.hold_out(labeled.labels_N, measures.HELD_OUT_SHARE, seed=HELD_OUT_SEED)
        labeled, tested = labeled.pick(fit), labeled.pick(held)
    if not len(tested.rows_N):
        raise UserError(
            f"No labeled image of {labeled.path} can be held out: no class keeps another one to learn from.",
            f"Name test images with {option('test')}, or use {option('on', 'pretraining')}, which needs no label.",
        )
    for part in (labeled, tested):
        check_channels(net, part)
    if on == "test" and labeled.manifest.digest == tested.manifest.digest:
        remark = f"{tested.path} has the images of {labeled.path}: the accuracies are of images learned from."
        tested = remarked(tested, remark)
    tested = numbered_as(labeled, tested)
    measures.check_labels(labeled.labels_N, tested.labels_N)
    return labeled, tested


def test_name(net: Pretrained, data: str | Path | None, test: str | Path | None) -> str | Path:
    if test is not None:
        return test
    if data is None and net.recipe.data.test_path is not None:
        return net.recipe.data.test_path
    if data is not None and Path(data).suffix != ".beton":
        return data  # a source has its own test split
    raise UserError(
        "There is no test set to evaluate on.", f"Name one with {option('test')}, or use {option('on', 'val')}."
    )


def is_same(name: str | Path, other: str | Path | None) -> bool:
    return other is not None and (str(name) == str(other) or Path(name).resolve() == Path(other).resolve())


def test_part(name: str | Path, read: Callable[..., Part], *, whole: bool) -> Part:
    """The test split of a source; its val split, with a remark, where it has no test.

    Args:
        name: the source.
        read: called with the source and a split.
        whole: whether a source without any splits is the test set, as one that is not also learned from is.
    """
    try:
        return read(name, "test")
    except MissingSplitError as error:
        if whole and not error.splits:
            return read(name, "train", part="whole")
        if "val" not in error.splits:
            raise
    return remarked(read(name, "val"), f"{name} has no test split; its val split was judged instead.")


def remarked(part: Part, remark: str | None) -> Part:
    """With one more remark."""
    return replace(part, remarks=(*part.remarks, remark)) if remark else part


def part_of(
    name: str | Path,
    split: str,
    *,
    trained_on: Manifest,
    folder: Path | None,
    on_error: OnError,
    download: bool,
    part: str | None = None,
) -> Part:
    """The labeled images of a .beton, or of one split of a source.

    Args:
        part: what the converted file is called by, next to the source's name; the split when absent.
    """
    path = file_of(name, split, trained_on, folder, on_error=on_error, download=download, part=part)
    labeled = labeled_part(path)
    return labeled if Path(name).suffix == ".beton" else replace(labeled, source=str(name), split=split)


def file_of(
    name: str | Path,
    split: str,
    trained_on: Manifest,
    folder: Path | None,
    *,
    on_error: OnError = "fail",
    download: bool = False,
    part: str | None = None,
) -> Path:
    """The .beton itself, or one converted from a source as the images of training were.

    A known set is converted once, a folder or archive each time.
    """
    path = Path(name)
    if path.suffix == ".beton":
        return existing(path)
    options = options_of(trained_on)
    if folder is None:
        words = ["fastssl", "convert", str(name), "DATA.beton", "--split", split]
        words += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        fix = f"Convert it first with `{shlex.join(words)}`."
        raise UserError(f"{name} is not a .beton file, and weights outside of a run have no folder to convert to.", fix)
    out = folder / f"{path.stem}-{part or split}.beton"
    if str(name) in NAMES and manifest_path(out).exists() and options_of(build.data.manifest_of(out)) == options:
        return out
    if str(name) not in NAMES and not path.exists():
        known = ", ".join(NAMES)
        raise UserError(f"{name} does not exist.", f"Give a .beton, a folder, an archive, or one of {known}.")
    folder.mkdir(parents=True, exist_ok=True)
    convert.convert(str(name), out, split=split, on_error=on_error, download=download, **options)
    return out


def own_file(net: Pretrained, field: str) -> Path:
    """One of the data files that the recipe names, which may have any suffix."""
    path: Path = getattr(net.recipe.data, field)
    if net.run_dir and not path.exists():
        raise build.run_data.moved(net.recipe, field, net.run_dir)
    return existing(path)


def existing(path: Path) -> Path:
    if path.is_dir():
        raise UserError(f"{path} is a folder of shards.", f"Name a labeled .beton with {option('data')}.")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist.", f"Name a labeled .beton with {option('data')}, made by `fastssl convert`."
        )
    return path


def labeled_part(path: Path) -> Part:
    labels_N, rows_N = build.data.labels_of(path), build.data.labeled_rows(path)
    unlabeled = len(labels_N) - len(rows_N)
    if not len(rows_N):
        raise UserError(f"None of the {unlabeled} images of {path} has a label.", "Name a labeled .beton instead.")
    remark = f"{unlabeled} images of {path} have no label, and are left out." if unlabeled else None
    return remarked(Part(path, rows_N, labels_N[rows_N], build.data.manifest_of(path)), remark)


def numbered_as(labeled: Part, tested: Part) -> Part:
    """The tested part with the labels that its classes have in the other file: each was numbered on its own.

    Labels stay where a file does not name its classes, or only one of the two names them by number.
    """
    learned, own = labeled.manifest.classes, tested.manifest.classes
    by_number = [all(name.isdecimal() for name in names) for names in (learned, own)]
    if not learned or not own or learned == own or by_number[0] != by_number[1]:
        return tested
    label_of = {name: label for label, name in enumerate(learned)}
    names = {label: build.data.class_name(own, label) for label in set(tested.labels_N.tolist())}
    known = set(labeled.labels_N.tolist())
    unseen = sorted(name for name in names.values() if label_of.get(name) not in known)
    if unseen:
        raise UserError(
            f"The test set has classes that train lacks: {', '.join(unseen[:10])}.",
            f"Name files of the same classes with {option('data')} and {option('test')}.",
        )
    labels = [label_of[names[label]] for label in tested.labels_N.tolist()]
    return replace(tested, labels_N=torch.tensor(labels, dtype=tested.labels_N.dtype))


def check_channels(net: Pretrained, part: Part) -> None:
    channels = len(net.clean.mean_C)
    if part.manifest.channels != channels:
        raise UserError(
            f"{part.path} has images of {part.manifest.channels} channels, the network takes {channels}.",
            f"Convert the data with {option('channels', channels)}.",
        )
