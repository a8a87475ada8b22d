"""Photographs for the suite's stages at 224 px: python bench/gpu_photographs.py OUT.json COUNT FILE.beton."""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from convert import make_photographs  # noqa: E402

from fastssl.bench.record import row, write  # noqa: E402
from fastssl.data.convert.convert import convert  # noqa: E402


def main(out: Path, count: int, beton: Path) -> None:
    """JPEGs of 340x256 px, kept as JPEG; the record says how fast they were converted."""
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder) / "photographs", count)
        beton.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        convert(Path(folder) / "photographs", beton, mode="jpg")
        seconds = time.perf_counter() - start
    write(out, "photographs", [row("fastssl", {"images": count}, "images_per_s", [count / seconds])])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
