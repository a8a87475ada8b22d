"""An output that does not fit is refused before the work begins, by the true size of what would be written."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from fastssl.data.convert.convert import convert
from fastssl.data.convert.space import SAMPLED, UNKNOWN
from fastssl.errors import UserError
from tests.data.test_sources import pack_tar, png

Usage = namedtuple("Usage", "total used free")
COUNT = 40


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / "a" / f"{i:02}.png")
    return tmp_path / "in"


@pytest.fixture
def free(monkeypatch):
    def has(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, count))

    return has


OPTIONS = [
    {"side_px": 32},
    {"max_side_px": 40},
    {"side_px": 32, "mode": "jpg"},
    {"side_px": 32, "dtype": "uint16"},
    {"side_px": 32, "val_count": 10},
    {"side_px": 32, "fraction": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_limit_lies_at_the_size_of_the_output(photos, tmp_path, free, options):
    out = tmp_path / "new" / "out.beton"
    free(1 << 40)
    convert(photos, out, **options)
    size = sum(512 * path.stat().st_blocks for path in out.parent.glob("*.beton"))
    shutil.rmtree(out.parent)
    free(int(size * 0.8))
    with pytest.raises(UserError, match=r"need about .* MB, .*new has .* MB free") as caught:
        convert(photos, out, **options)
    assert "side_px" in str(caught.value)
    assert not out.parent.exists()
    free(int(size * 1.2))
    convert(photos, out, **options)


def test_shards_are_counted_with_their_headers(photos, tmp_path, free):
    out = tmp_path / "shards"
    convert(photos, out, format="webdataset", side_px=16)
    size = sum(path.stat().st_size for path in out.iterdir())
    free(int(size * 0.8))
    with pytest.raises(UserError, match="free"):
        convert(photos, tmp_path / "others", format="webdataset", side_px=16)


def test_a_journal_takes_the_space_of_a_second_copy(photos, tmp_path, free):
    free(int(COUNT * 32 * 32 * 3 * 1.5))
    with pytest.raises(UserError, match="free"):
        convert(photos, tmp_path / "out.beton", side_px=32, resume=True)
    convert(photos, tmp_path / "out.beton", side_px=32)


@pytest.mark.parametrize("side_px", [None, 32])
def test_a_stream_of_known_length_is_checked(tmp_path, free, side_px):
    np.savez(tmp_path / "x.npz", images=np.zeros((COUNT, 32, 32, 3), np.uint8))
    free(COUNT * 32 * 32 * 3 - 1)
    with pytest.raises(UserError, match="40 images"):
        convert(tmp_path / "x.npz", tmp_path / "out.beton", side_px=side_px)
    free(COUNT * 32 * 32 * 3)
    manifest = convert(tmp_path / "x.npz", tmp_path / "out.beton", side_px=side_px)
    assert manifest.count == COUNT
    assert manifest.account["notes"] == []


def test_an_archive_that_tells_its_length_at_its_end_says_so(tmp_path, free):
    path = pack_tar(tmp_path / "x.tar", {"a/0.png": png(1), "b/1.png": png(2)})
    free(0)
    assert convert(path, tmp_path / "out.beton").account["notes"] == [UNKNOWN]
    with pytest.raises(UserError, match="free"):  # shards read it whole first, and know
        convert(path, tmp_path / "shards", format="webdataset")


def test_unreadable_images_do_not_stand_in_the_way(photos, tmp_path, free):
    for path in sorted((photos / "a").iterdir())[: COUNT - SAMPLED]:
        path.write_bytes(b"no picture")
    free(1 << 40)
    assert convert(photos, tmp_path / "out.beton", max_side_px=40, on_error="skip").count == SAMPLED
