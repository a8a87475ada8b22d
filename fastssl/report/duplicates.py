"""Near-duplicates and outliers that `fastssl duplicates` left in a run: pictures of the first ones, tables of all.

Nothing in the file is believed: a record of another form is damaged, and a picture is decoded and encoded again.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastssl.report.figure import Figure, Grid, Section
from fastssl.report.inputs import LabeledRun, is_number, plain
from fastssl.report.pictures import GAP_PX, TILE_PX, Picture, png, strip, uri
from fastssl.runs import reading
from fastssl.runs.directory import DUPLICATES

MOST_PICTURE_BYTES, MOST_PICTURE_PX = 1 << 16, 1 << 16
MOST_TILES = 16
FOLD = 8  # rows that a table shows before it has to be opened
PAIRS = "Pairs of images by the cosine of their centered features, the most similar first. Numbers are the table's."
OUTLIERS = "Images by the mean cosine to their 5 nearest neighbors, the least similar first."
Row = tuple[str, ...]  # names of images, then the similarity as text


def sections(run: LabeledRun) -> list[Section]:
    """One section, none where the run holds no such result.

    Raises:
        UserError: when the file is damaged.
    """
    path = run.folder / DUPLICATES
    record = reading.read_mapping(path)
    return [section(run, record, path)] if record else []


def section(run: LabeledRun, record: Mapping[str, Any], path: Path) -> Section:
    try:
        pairs = [row_of(pair, "image", "other") for pair in record["pairs"]]
        outliers = [row_of(outlier, "image") for outlier in record["outliers"]]
        tiles = {str(name): tile_of(data) for name, data in dict(record.get("pictures") or {}).items()}
        intro = intro_of(record, len(pairs))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise reading.damaged(path) from error
    figures = (
        tiles_figure(f"{run.slug}-duplicates", "Near-duplicates", PAIRS, pairs, tiles),
        tiles_figure(f"{run.slug}-outliers", "Outliers", OUTLIERS, outliers, tiles),
    )
    grids = (table(("pair", "image", "other", "cosine"), pairs), table(("outlier", "image", "cosine"), outliers))
    return Section(
        f"Near-duplicates and outliers: {run.label}",
        intro,
        [figure for figure in figures if figure],
        [grid for grid in grids if grid.rows],
    )


def row_of(entry: Mapping[str, Any], *names: str) -> Row:
    if not is_number(entry["similarity"]):
        raise ValueError
    return (*(str(entry[name]) for name in names), f"{entry['similarity']:.3f}")


def tile_of(data: str) -> Picture:
    """A square picture with the image in its middle."""
    encoded = base64.b64decode(data[:MOST_PICTURE_BYTES], validate=True)
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        if image.width * image.height > MOST_PICTURE_PX:
            raise ValueError
        tile = image.convert("RGB")
    square = Image.new("RGB", (max(tile.size), max(tile.size)), (127, 127, 127))
    square.paste(tile, ((square.width - tile.width) // 2, (square.height - tile.height) // 2))
    return np.asarray(square)


def intro_of(record: Mapping[str, Any], pairs: int) -> str:
    """What was compared with what, in one line."""
    images, threshold, step = record["images"], record["threshold"], record.get("step")
    if not (is_number(images) and is_number(threshold)):
        raise ValueError
    network = f", step {step}" if is_number(step) else ""
    more = " or more" if pairs and pairs == record.get("most") else ""
    count = "No pair" if not pairs else f"{pairs}{more} pair{'' if pairs == 1 and not more else 's'}"
    source = plain(str(record["source"]), 120)
    return (
        f"{count} of {images:,} images of {source} with a cosine of {threshold:g} or more, by the features of this "
        f"run{network}. This is the backbone's opinion: look before you delete."
    )


def tiles_figure(
    name: str, title: str, caption: str, rows: Sequence[Row], tiles: Mapping[str, Picture]
) -> Figure | None:
    """A grid of numbered pictures; None where there are none."""
    shown = [(i, row) for i, row in enumerate(rows[:MOST_TILES], start=1) if all(key in tiles for key in row[:-1])]
    strips = [strip([tiles[key] for key in row[:-1]], gap_after=-1) for _, row in shown]
    if not strips:
        return None
    items = "".join(
        f'<li><img alt="{escape(plain(" and ".join(row[:-1]), 200))}" src="{uri(image)}">{i}: {row[-1]}</li>'
        for (i, row), image in zip(shown, strips, strict=True)
    )
    pairs = len(rows[0]) > 2
    sheet = Image.new("RGBA", (strips[0].width, len(strips) * (TILE_PX + GAP_PX)), (0, 0, 0, 0))
    for i, image in enumerate(strips):
        sheet.paste(image, (0, i * (TILE_PX + GAP_PX)))
    body = f'<ul class="tiles {"pairs" if pairs else "singles"}">{items}</ul>'
    return Figure(name, title, caption, body, {f"{name}.png": png(sheet)}, columns=2 if pairs else 1)


def table(heads: Sequence[str], rows: Sequence[Row]) -> Grid:
    cells = [[str(i), *(plain(cell, 200) for cell in row)] for i, row in enumerate(rows, start=1)]
    return Grid(heads, cells, fold=len(cells) > FOLD, what=f"{heads[0]}s")
