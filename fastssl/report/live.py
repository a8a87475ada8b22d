"""The report of runs that still train: written again as they log, until the last of them has ended.

The page makes its browser load it again. Pictures, whose features take time from training, are drawn anew only after
a new checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from fastssl.errors import UserError
from fastssl.report import check, page, pictures, sections_of, write
from fastssl.report.figure import Section, require_matplotlib
from fastssl.report.inputs import LabeledRun, Record, read_inputs
from fastssl.runs import checkpoint
from fastssl.training.plain import plain_torch

WATCHED = ("recipe.yaml", "metrics.jsonl", "summary.json", "duplicates.json")
Content = tuple[list[LabeledRun], list[tuple[str, Record]], list[Section]]


@plain_torch()
def live_report(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    images: int = 1500,
    every_s: float = 10.0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes `out/index.html` and its figures every so often while a run trains, and once more when none does.

    Whatever ends it, be it an error or a signal, the page that stays no longer reloads itself.

    Args:
        inputs: as for `report`.
        out: as for `report`.
        images: as for `report`.
        every_s: seconds between two pages, and between two loads in a browser, > 0.
        on_progress: called with what is being drawn.

    Returns:
        What `report` returns, of the last page.

    Raises:
        UserError: as `report`.
    """
    check(inputs, images=images)
    if not every_s > 0:
        raise UserError(f"every_s is {every_s:g}.", "Set it to 10, for example.")
    require_matplotlib()
    paths, folder, pictures_of = [Path(given) for given in inputs], Path(out), PicturesOnce(images, on_progress)
    content: Content | None = None
    seen: list[Any] = []
    try:
        while is_training(now := read_inputs(paths)):
            if seen != (stamps := [stamps_of(run) for run in now[0]]):
                first, seen, content = content is None, stamps, with_sections(now, pictures_of)
                written = write(folder, page.html(*content, reload_s=every_s), content[2])
                if first:
                    on_progress(f"{written['page']} is written again every {every_s:g} s until training ends.")
            sleep(every_s)
        if content is None:
            on_progress("No run is training, so the page is written once.")
        last = with_sections(read_inputs(paths), pictures_of)  # the end was seen after metrics.jsonl had been read
        return write(folder, page.html(*last), last[2])
    except BaseException:
        if content:
            write(folder, page.html(*content), content[2])
        raise


class PicturesOnce:
    """Pictures of a run, drawn once for each of its checkpoints."""

    def __init__(self, images: int, on_progress: Callable[[str], None]) -> None:
        self.images, self.on_progress = images, on_progress
        self.drawn: dict[Path, tuple[tuple[str, ...], Section]] = {}

    def __call__(self, run: LabeledRun) -> Section:
        newest = [path.name for path in checkpoint.existing(run.folder / "checkpoints")[:1]]
        key = (run.label, run.slug, *newest)
        if run.folder not in self.drawn or self.drawn[run.folder][0] != key:
            self.on_progress(f"Images of {run.label}")
            self.drawn[run.folder] = key, pictures.section(run, images=self.images)
        return self.drawn[run.folder][1]


def is_training(inputs: tuple[list[LabeledRun], list[tuple[str, Record]]]) -> bool:
    return any(run.state == "running" for run in inputs[0])


def with_sections(inputs: tuple[list[LabeledRun], list[tuple[str, Record]]], pictures_of: PicturesOnce) -> Content:
    return *inputs, sections_of(*inputs, pictures_of)


def stamps_of(run: LabeledRun) -> list[Any]:
    """What differs as soon as one of a run's files was written."""
    files = [run.folder / name for name in WATCHED]
    return [run.folder, run.state, *((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())]
