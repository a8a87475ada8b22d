"""Gives the samples of a finished `.beton` other labels: an archive names its last class only at its end."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastssl.data.beton.format import FIELD, HEADER, INT, record_type


def relabel(path: Path, labels_N: NDArray[np.int64]) -> None:
    """Overwrite the first integer field of every sample of the file at `path`, which we wrote."""
    header = np.fromfile(path, HEADER, 1)[0]
    fields = np.fromfile(path, FIELD, int(header["fields"]), offset=HEADER.itemsize)
    kinds = [int(kind) for kind in fields["type"]]
    assert int(header["samples"]) == len(labels_N)
    at = HEADER.itemsize + fields.nbytes
    records = np.memmap(path, record_type(kinds), "r+", offset=at, shape=(len(labels_N),))
    records[f"f{kinds.index(INT)}"] = labels_N
    records.flush()
