"""Near-duplicates and outliers of a source, by the features of a trained backbone."""

import csv
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastssl.errors import UserError
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.load import Pretrained
from fastssl.probes.duplicates import near_duplicates, outliers
from fastssl.runs.files import atomic_write

NEIGHBORS = 5
COLUMNS = ("kind", "image", "other", "similarity")
Progress = Callable[[int, int | None], None]


def duplicates(
    weights: str | Path | Pretrained,
    source: str | Path,
    out: str | Path | None = None,
    *,
    threshold: float = 0.95,
    most: int = 100,
    split: str = "train",
    device: str = "auto",
    on_error: Literal["fail", "skip"] = "fail",
    count: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pairs of images that look alike to a backbone, and images that look like none of the others.

    Args:
        weights: a run folder, exported weights, or what `load` gave.
        source: what `convert` reads.
        out: a .csv to write (kind, image, other, similarity); none when absent.
        threshold: smallest cosine similarity of a pair, in [-1, 1].
        most: of the pairs and of the outliers, >= 1.
        split, device, on_error, count, progress: as for `embed`.

    Returns:
        images, skipped, threshold; pairs: [{"image", "other", "similarity"}], the most similar first; outliers:
        [{"image", "similarity"}], by the mean similarity to the 5 nearest others, the least similar first.

    Raises:
        UserError: for everything a person can fix.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold is {threshold:g}, and similarities lie in [-1, 1].", "Set it to 0.95, for example.")
    if most < 1:
        raise UserError(f"most is {most}.", "Set it to 1 or more.")
    if out is not None and Path(out).suffix != ".csv":
        raise UserError(f"out is {out}.", "Give it the suffix .csv.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        options: dict[str, Any] = {"split": split, "device": device, "on_error": on_error, "count": count}
        written = embed(weights, source, path, progress=progress, **options)
        features_NF = torch.from_numpy(np.load(path))
        with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
            names = [row["id"] for row in csv.DictReader(file)]
    if len(names) < 2:
        raise UserError(f"{source} holds {len(names)} readable image.", "Give a source of two or more.")
    pairs, similarity = near_duplicates(features_NF, threshold=threshold, most=most)
    lonely, nearness = outliers(features_NF, k=NEIGHBORS, most=most)
    record = {
        "source": str(source),
        "images": len(names),
        "skipped": written["skipped"],
        "threshold": threshold,
        "pairs": [
            {"image": names[a], "other": names[b], "similarity": round(value, 4)}
            for (a, b), value in zip(pairs.tolist(), similarity.tolist(), strict=True)
        ],
        "outliers": [
            {"image": names[i], "similarity": round(value, 4)}
            for i, value in zip(lonely.tolist(), nearness.tolist(), strict=True)
        ],
    }
    if out is not None:
        atomic_write(Path(out), table_of(record).encode())
    return record


def table_of(record: dict[str, Any]) -> str:
    """The record as CSV, one line per pair and outlier."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"kind": "pair"} | pair for pair in record["pairs"])
    writer.writerows({"kind": "outlier"} | outlier for outlier in record["outliers"])
    return text.getvalue()
