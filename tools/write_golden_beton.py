"""Write tests/golden/ffcv.beton.xz with FFCV itself: what its reader and ours must agree on without FFCV installed.

Run with FFCV 1.0.2 installed: python tools/write_golden_beton.py. Raw and JPEG images of many sizes, next to an integer
label, and a float, bytes, JSON and array field that a reader of images must step over.
"""

import lzma
import tempfile
from pathlib import Path

import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.writer import DatasetWriter

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "ffcv.beton.xz"
COUNT = 12


class Samples:
    """What is written; tests/data/test_beton.py computes the same pixels."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple:
        y, x = np.mgrid[0 : 10 + i, 0 : 20 - i]
        image = np.stack([x * 9 + i, y * 8 + i * 5, x + y * 3], axis=2).astype(np.uint8)
        extra = np.full((2, 3), i, np.int16)
        return i / 3, {"name": "é" * i}, image, extra, np.full(i + 1, i, np.uint8), 1000 - i


def main() -> None:
    fields = {
        "score": FloatField(),
        "about": JSONField(),
        "picture": RGBImageField(write_mode="smart", smart_threshold=650),
        "mask": NDArrayField(np.dtype(np.int16), (2, 3)),
        "blob": BytesField(),
        "target": IntField(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.beton"
        DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(Samples())
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_bytes(lzma.compress(path.read_bytes(), preset=9))


if __name__ == "__main__":
    main()
