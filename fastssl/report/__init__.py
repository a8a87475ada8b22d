"""One page of what runs and benchmarks show: self-contained HTML without scripts, and each figure as a file next to it.

Everything drawn comes from run directories, benchmark records and the data files they name. What is absent is said
on the page and left out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastssl.errors import UserError, option
from fastssl.pretrained.load import run_folder
from fastssl.report import bench, curves, duplicates, page, pictures
from fastssl.report.figure import Section, require_matplotlib
from fastssl.report.inputs import LabeledRun, Record, read_inputs
from fastssl.runs.files import atomic_write
from fastssl.training.plain import plain_torch


@plain_torch()
def report(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    images: int = 1500,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes `out/index.html` and its figures.

    Args:
        inputs: run directories, folders of runs, and benchmark records (.json).
        out: a folder; made when absent.
        images: of the test set (of the training set without one) to embed for spectrum, neighbors and map.
        on_progress: called with what is being drawn.

    Returns:
        {"page": path, "files": every file written, "skipped": one sentence for each figure left out}.

    Raises:
        UserError: when an input is none of these or damaged, or matplotlib is missing; then nothing is written.
    """
    check(inputs, images=images)
    require_matplotlib()
    runs, records = read_inputs([Path(given) for given in inputs])

    def pictures_of(run: LabeledRun) -> Section:
        on_progress(f"Images of {run.label}")
        return pictures.section(run, images=images)

    sections = sections_of(runs, records, pictures_of)
    return write(Path(out), page.html(runs, records, sections), sections)


def check(inputs: Sequence[str | Path], *, images: int) -> None:
    """UserError for one path in place of a list, and for no images."""
    if isinstance(inputs, str | Path):
        raise UserError(f"inputs is {str(inputs)!r}, not a list.", f"Pass a list: [{str(inputs)!r}].")
    if images < 1:
        raise UserError(f"{option('images')} is {images}.", "Set it to 1 or more.")


def sections_of(
    runs: Sequence[LabeledRun],
    records: Sequence[tuple[str, Record]],
    pictures_of: Callable[[LabeledRun], Section],
) -> list[Section]:
    """Curves of all runs; pictures, near-duplicates and outliers of each; benchmark records."""
    sections = [curves.section(runs)] if runs else []
    for run in runs:
        sections += [pictures_of(run), *duplicates.sections(run)]
    slugs = bench.slugs([name for name, _ in records])
    return sections + [
        bench.section(name, record, slug=slug) for (name, record), slug in zip(records, slugs, strict=True)
    ]


def image_page(
    weights: Path, *, checkpoint: str | Path = "last", device: str = "auto", on_warning: Callable[[str], None]
) -> str | None:
    """Writes neighbors, spectrum and map of a run's images into `images/` of the run; returns the page's path.

    None when these weights lie in no run or matplotlib is missing, which `on_warning` is then called with.

    Args:
        weights: a run folder, or a checkpoint or file of weights in it.
        checkpoint: of a run folder, see `load`.
        device: that computes features.
        on_warning: called with one sentence.
    """
    run = run_folder(weights)
    if run is None:
        on_warning(f"No page of images: {weights} lies in no run, whose folder would take it.")
        return None
    try:
        require_matplotlib()
        runs, _ = read_inputs([run])
        sections = [
            pictures.section(
                labeled, images=pictures.PAGE_IMAGES, weights=weights, checkpoint=checkpoint, device=device
            )
            for labeled in runs
        ]
        return str(write(runs[0].folder / "images", page.html(runs, [], sections), sections)["page"])
    except UserError as error:
        on_warning(f"No page of images: {error.what} {error.fix}")
        return None


def write(folder: Path, text: str, sections: Sequence[Section]) -> dict[str, Any]:
    """The page after all of its figures, so that a page is never without them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, data in [(n, d) for s in sections for f in s.figures for n, d in f.files.items()]:
            atomic_write(folder / name, data)
            written.append(folder / name)
        atomic_write(folder / "index.html", text)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}.", f"Choose another {option('out')}."
        ) from error
    files = [str(path) for path in (folder / "index.html", *written)]
    return {"page": files[0], "files": files, "skipped": [note for s in sections for note in s.skipped]}
