"""Shards and Parquet files that come with other files: what is taken, what is counted, and what is refused."""

import io
import tarfile

import pytest
from test_sources import pack_tar, png
from test_sources_tables import named

from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.errors import UserError

APPLE_DOUBLE = b"\0\5\x16\7" + bytes(80)  # what macOS's tar stores next to each file


def samples(*values, label=True):
    return {
        f"{value}.{suffix}": data
        for value in values
        for suffix, data in (("png", png(value)), *([("cls", b"%d" % value)] if label else []))
    }


def parquet(path, images, labels=None, names=None, **columns):
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [{"bytes": png(value)} for value in images], **columns})
    if labels is not None:
        table = table.append_column("label", pyarrow.array(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table if names is None else named(table, names), path)
    return path


@pytest.mark.parametrize("hidden", ["._{}", "__MACOSX/{}", ".x/{}"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_hidden_members_cut_no_sample_in_two(tmp_path, hidden, kind):
    members = {}
    for name, data in samples(0, 1).items():
        members |= {hidden.format(name): APPLE_DOUBLE, name: data, hidden.format("a.json"): b"{}"}
    path = pack_tar(tmp_path / "m-000000.tar", members)
    source = open_source(tmp_path if kind == "folder" else path)
    assert [(item.data, item.label) for item in source.items()] == [(png(0), 0), (png(1), 1)]
    assert sum(source.account.passed_over.values()) == 5


def test_hidden_shards_and_parquet_files_do_not_count(tmp_path):
    (tmp_path / "shards").mkdir()
    pack_tar(tmp_path / "shards" / "m-000000.tar", samples(0))
    (tmp_path / "shards" / "._m-000000.tar").write_bytes(APPLE_DOUBLE)
    assert len(list(open_source(tmp_path / "shards").items())) == 1
    parquet(tmp_path / "rows" / "a-0.parquet", [0, 1])
    (tmp_path / "rows" / "._a-0.parquet").write_bytes(APPLE_DOUBLE)
    parquet(tmp_path / "rows" / ".cache" / "a-1.parquet", [2])
    assert len(list(open_source(tmp_path / "rows").items())) == 2


CAT_DOG = {"labels": [0, 1], "names": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({"labels": [0, 1], "names": ["ant", "bee"]}, "class names: ant, bee instead of cat, dog"),
        ({"labels": [0, 1], "names": ["dog", "cat"]}, "class names: dog, cat instead of cat, dog"),
        ({"labels": ["dog", "cat"]}, "class names: none instead of cat, dog"),
        ({}, "label column: none instead of label"),
        ({"target": [0, 1]}, "label column: target instead of label"),
    ],
    ids=["others", "another order", "text", "no labels", "another column"],
)
def test_parquet_files_that_differ_are_refused(tmp_path, second, named):
    parquet(tmp_path / "a-0.parquet", [0, 1], **CAT_DOG)
    parquet(tmp_path / "a-1.parquet", [2, 3], **CAT_DOG)
    assert len(list(open_source(tmp_path).items())) == 4
    parquet(tmp_path / "a-2.parquet", [4, 5], **second)
    parquet(tmp_path / "a-3.parquet", [4, 5], **second)
    with pytest.raises(UserError, match=named) as error:
        open_source(tmp_path)
    assert "a-2.parquet differs from a-0.parquet" in error.value.what
    assert len(list(open_source(tmp_path, split="unlabeled").items())) == 8


def test_files_that_are_left_out_are_counted(tmp_path):
    shards, rows = tmp_path / "shards", tmp_path / "rows"
    (shards / "more").mkdir(parents=True)
    for value, name in enumerate(("train-000000", "test-000000", "extra-000000", "more/train-000001")):
        pack_tar(shards / f"{name}.tar", samples(value))
    pack_tar(shards / "train-000001.tar.gz", samples(4), "w:gz")
    (shards / "train-000000.idx").write_text("")
    manifest = convert(shards, tmp_path / "out.beton")
    assert manifest.count == 1
    assert manifest.account["passed_over"] == {
        ".tar file whose name says no split": 1,
        "archive in a folder below": 1,
        "archive that is no plain .tar": 1,
    }
    for name in ("train-0", "test-0", "extra-0"):
        parquet(rows / f"{name}.parquet", [0], labels=["a"])
    manifest = convert(rows, tmp_path / "out.beton")
    assert (manifest.count, manifest.account["passed_over"]) == (1, {".parquet file whose name says no split": 1})
    (rows / "train-0.parquet").unlink()
    (rows / "test-0.parquet").unlink()
    assert convert(rows, tmp_path / "out.beton").account["passed_over"] == {}


@pytest.mark.parametrize("suffix", ["jpg", "cls", "CLS"])
def test_two_members_of_one_suffix_in_a_sample_are_refused(tmp_path, suffix):
    more = {"0.JPG": png(7)} if suffix == "jpg" else {f"0.{suffix}": b"1"}
    with tarfile.open(tmp_path / "a-000000.tar", "w") as archive:
        for members in ({"0.jpg": png(0), "0.cls": b"0"}, more, {"1.jpg": png(1), "1.cls": b"1"}):
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match="one of two members of its sample"):
        convert(tmp_path, tmp_path / "out.beton")
    assert convert(tmp_path, tmp_path / "out.beton", on_error="skip").count == 1
