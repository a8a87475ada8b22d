"""Shards and Parquet files that come with other files: what is taken, what is counted, and what is refused."""

import pytest
from test_sources import pack_tar, png
from test_sources_tables import named

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
