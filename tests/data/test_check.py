"""What a conversion refuses: found by `check` too, at the start where that can be, with a fix that fits."""

import numpy as np
import pytest
from test_sources import pack_tar, png, tree

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.convert.labels import read_classes
from fastssl.data.sources import open_source
from fastssl.errors import UserError

REFUSED = {
    "classes": ({"classes": ["a"]}, "not in the given list: b"),
    "val_count": ({"val_count": 6}, "val_count is 6, there are 6 images"),
    "mode": ({"mode": "jpg", "channels": 1}, "JPEGs of 3 channels of uint8"),
    "shards": ({"format": "webdataset", "dtype": "uint16"}, "Shards|shards"),
    "sizes": ({"channels": 1}, "Set side_px so that all images get one size"),
    "sizes of 16 bits": ({"dtype": "uint16"}, "Set side_px so that all images get one size"),
}


@pytest.mark.parametrize("source", ["in", "x.tar"])
@pytest.mark.parametrize("kind", REFUSED)
def test_check_refuses_what_the_conversion_refuses(tmp_path, source, kind):
    files = {f"{'ab'[i % 2]}/{i}.png": png(i, 4 + i) for i in range(6)}
    tree(tmp_path / "in", files)
    pack_tar(tmp_path / "x.tar", files)
    options, named = REFUSED[kind]
    for check in (True, False):
        with pytest.raises(UserError, match=named) as error:
            convert(tmp_path / source, tmp_path / "out", check=check, **options)
        assert ".part" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "x.tar"}


@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"limit": 3, "shuffle": True}, {"classes": ["c", "b", "a"]}])
def test_check_reads_what_the_conversion_reads(tmp_path, options):
    tree(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(8)})
    checked = convert(tmp_path / "in", None, check=True, **options)
    assert checked.to_json() == convert(tmp_path / "in", tmp_path / "out.beton", **options).to_json()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"side_px": 8, "max_side_px": 4}, "side_px and max_side_px are both set"),
        ({"channels": 1500}, "Set channels to 1 to 1024"),
        ({"val_count": -5}, "Set val_count to 0 or more"),
    ],
)
def test_wrong_numbers_are_named_together_before_the_source_is_opened(tmp_path, options, named):
    with pytest.raises(UserError, match=named) as error:
        convert(tmp_path / "absent", tmp_path / "out.beton", quality=0, **options)
    assert "quality is 0" in error.value.what


@pytest.mark.parametrize("options", [{"max_side_px": 4}, {"side_px": 4}, {}])
def test_images_without_pixels_are_refused(tmp_path, options):
    np.save(tmp_path / "x.npy", np.zeros((2, 0, 0, 3), np.uint8))
    with pytest.raises(UserError, match=r"has no pixels|holds no"):
        convert(tmp_path / "x.npy", tmp_path / "out.beton", **options)


def test_a_missing_split_names_those_that_are_accepted(tmp_path):
    tree(tmp_path, {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "x.csv").write_text("path,split\na.png,Training\nb.png,validation\n")
    with pytest.raises(UserError, match="Set split to one of: train, val") as error:
        open_source(tmp_path / "x.csv", split="test")
    for word in error.value.fix.rpartition(": ")[2].rstrip(".").split(", "):
        assert len(open_source(tmp_path / "x.csv", split=word)) == 1
    (tmp_path / "x.csv").write_text("path,partition\na.png,0\nb.png,1\n")
    with pytest.raises(UserError, match="Call its splits train, test, val, unlabeled, not 0, 1"):
        open_source(tmp_path / "x.csv")


def test_files_of_class_names_that_are_absent_or_begin_with_a_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_bytes("\ufeffcod\neel\n".encode())
    (tmp_path / "x.beton.json").write_bytes('\ufeff{"classes": ["cod", "eel"]}'.encode())
    assert read_classes("names.txt") == read_classes("x.beton.json") == ("cod", "eel")
    for absent in ("nmaes.txt", "data/names", str(tmp_path / "nmaes")):
        with pytest.raises(UserError, match=r"no file .* of class names"):
            read_classes(absent)
    assert read_classes("cod") == ("cod",)
    assert read_classes("cod, sp.") == ("cod", "sp.")


@pytest.mark.parametrize("label", [True, False])
def test_a_range_may_be_of_one_shard(tmp_path, label):
    files = {"0.png": png(1)} | ({"0.cls": b"7"} if label else {})
    pack_tar(tmp_path / "a-000000.tar", files)
    manifest = convert(tmp_path / "a-{000000..000000}.tar", tmp_path / "out.beton")
    assert manifest.classes == (("7",) if label else ())
    assert int(Beton(tmp_path / "out.beton").image(0)[0, 0, 0]) == 1
