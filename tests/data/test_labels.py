"""Labels of every type become the classes that an independent reading gives, or a clear error."""

import csv
import json
import math
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.data.sources.choices import Choices
from fastssl.data.sources.labels import number_labels, read_label, sorted_names
from fastssl.errors import UserError
from tests.data.test_sources import pack_tar, png, tree

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def named(path, out, **options):
    """Class name of each stored image, None where it has none."""
    manifest = convert(path, out, **options)
    return [None if label < 0 else manifest.classes[label] for label in Beton(out).labels], manifest


COLUMNS = {
    "int64": (pa.array([3, 0, None, -1, 3]), ["3", "0", None, None, "3"]),
    "uint8": (pa.array([3, 0, 0, 1, 3], pa.uint8()), ["3", "0", "0", "1", "3"]),
    "float": (pa.array([3.0, 0.0, None, math.nan, -1.0]), ["3", "0", None, None, None]),
    "bool": (pa.array([True, False, None, True, True]), ["1", "0", None, "1", "1"]),
    "string": (pa.array(["b", "a", None, "", " b "]), ["b", "a", None, None, "b"]),
    "large_string": (pa.array(["b", "a", None, "", "nan"], pa.large_string()), ["b", "a", None, None, None]),
    "dictionary": (pa.array(["b", "a", None, "a", "b"]).dictionary_encode(), ["b", "a", None, "a", "b"]),
    "numbers in text": (pa.array(["10", "9", "-1", "10.0", "9"]), ["10", "9", None, "10", "9"]),
    "huge": (pa.array([30_000_000, 10**9, 10**15, 5, 5]), ["30000000", "1000000000", str(10**15), "5", "5"]),
    "composed": (pa.array(["é", "e\u0301", "z", "z", "é"]), ["é", "é", "z", "z", "é"]),
    "lists of one": (pa.array([[3], [0], None, [-1], [3]]), ["3", "0", None, None, "3"]),
    "all null": (pa.nulls(5), [None] * 5),
}
if hasattr(pa, "string_view"):
    COLUMNS["string_view"] = (pa.array(["b", "a", None, "a", "b"], pa.string_view()), ["b", "a", None, "a", "b"])


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_each_type(tmp_path, kind):
    column, expected = COLUMNS[kind]
    table = pa.table({"image": pa.array([png(i) for i in range(5)]), "label": column})
    parquet.write_table(table, tmp_path / "x.parquet")
    found, manifest = named(tmp_path / "x.parquet", tmp_path / "x.beton")
    assert found == expected
    names = {name for name in expected if name is not None}
    assert set(manifest.classes) == names
    assert manifest.unlabeled == expected.count(None)
    assert manifest.account["label_from"] == "label"
    if all(name.isdecimal() for name in names):
        assert list(manifest.classes) == sorted(names, key=int)


@pytest.mark.parametrize("column", [pa.array([[1, 2]] * 2), pa.array([{"a": 1}] * 2), pa.array([b"a"] * 2)], ids=str)
def test_labels_that_cannot_be_used_are_an_error(tmp_path, column):
    table = pa.table({"image": pa.array([png(i) for i in range(2)]), "label": column, "other": pa.array(["a", "b"])})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"neither numbers nor names|several columns of bytes"):
        open_source(tmp_path / "x.parquet")
    found, _ = named(tmp_path / "x.parquet", tmp_path / "x.beton", label_column="other", image_column="image")
    assert found == ["a", "b"]


def test_half_a_class_is_an_error_with_its_row(tmp_path):
    table = pa.table({"image": pa.array([png(i) for i in range(2)]), "label": pa.array([1.0, 1.5])})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 1: label 1\.5 is not a whole number"):
        convert(tmp_path / "x.parquet", tmp_path / "x.beton")


def test_memory_and_manifest_do_not_grow_with_the_largest_label(tmp_path):
    tree(tmp_path, {f"{i}.png": png(i) for i in range(3)})
    (tmp_path / "x.csv").write_text("path,label\n0.png,7\n1.png,1000000000\n2.png,30000000\n")
    tracemalloc.start()
    found, manifest = named(tmp_path / "x.csv", tmp_path / "x.beton", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["7", "1000000000", "30000000"]
    assert manifest.classes == ("7", "30000000", "1000000000")
    assert (tmp_path / "x.beton.json").stat().st_size < 10_000
    assert peak < 200 << 20


CSVS = {
    "comma": ("path,label\na.png,x\nb.png,y\n", ["x", "y"]),
    "semicolon": ("path;label\na.png;x\nb.png;y\n", ["x", "y"]),
    "tab": ("path\tlabel\na.png\tx\nb.png\ty\n", ["x", "y"]),
    "bar": ("path|label\na.png|x\nb.png|y\n", ["x", "y"]),
    "no header": ("a.png,x\nb.png,y\n", ["x", "y"]),
    "blanks": ("path, label\na.png, x \n b.png,x\n", ["x", "x"]),
    "gaps": ("path,label\na.png,\nb.png,3.0\n", [None, "3"]),
    "-1": ("path,label\na.png,-1\nb.png,3\n", [None, "3"]),
    "ids": ("image_id,category\na,x\nb,y\n", ["x", "y"]),
    "byte order mark": ("\ufeffpath,label\na.png,x\nb.png,y\n", ["x", "y"]),
    "empty lines": ("path,label\n\na.png,x\n,\nb.png,y\n", ["x", "y"]),
    "quoted": ('path,label\n"a.png","x, the first"\nb.png,y\n', ["x, the first", "y"]),
    "other columns": ("width,path,species\n3,a.png,x\n4,b.png,y\n", [None, None]),
}


@pytest.mark.parametrize("kind", CSVS)
def test_csv_of_each_form(tmp_path, kind):
    text, expected = CSVS[kind]
    tree(tmp_path, {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    found, _ = named(tmp_path / "x.csv", tmp_path / "x.beton")
    assert found == expected
    if kind == "other columns":
        assert named(tmp_path / "x.csv", tmp_path / "x.beton", label_column="species")[0] == ["x", "y"]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_an_unknown_header_is_no_image(tmp_path, on_error):
    tree(tmp_path, {"a.png": png(1)})
    (tmp_path / "x.csv").write_text("foto,kind\na.png,x\n")
    with pytest.raises(UserError, match="no column that names images") as error:
        convert(tmp_path / "x.csv", tmp_path / "x.beton", on_error=on_error)
    assert "image_column of `convert`" in error.value.fix
    found, _ = named(tmp_path / "x.csv", tmp_path / "x.beton", image_column="foto", label_column="kind")
    assert found == ["x"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_csv_in_utf_16(tmp_path, encoding):
    tree(tmp_path, {"ä.png": png(1)})
    (tmp_path / "x.csv").write_bytes("\ufeffpath\tlabel\nä.png\tKöter\n".encode(encoding))
    assert named(tmp_path / "x.csv", tmp_path / "x.beton")[0] == ["Köter"]


def test_paths_may_start_elsewhere(tmp_path):
    tree(tmp_path / "images", {"a.png": png(1)})
    (tmp_path / "x.csv").write_text("path,label\na.png,x\n")
    assert named(tmp_path / "x.csv", tmp_path / "x.beton", image_root=tmp_path / "images")[0] == ["x"]


MEMBERS = {
    "number": ({"json": b'{"label": 3}'}, "3"),
    "whole float": ({"json": b'{"label": 3.0}'}, "3"),
    "list of one": ({"json": b'{"label": [3]}'}, "3"),
    "label_id": ({"json": b'{"label_id": 4}'}, "4"),
    "class_id": ({"json": b'{"class_id": 5}'}, "5"),
    "name": ({"json": b'{"class": "cat"}'}, "cat"),
    "null": ({"json": b'{"label": null, "class": "cat"}'}, "cat"),
    "cls": ({"cls": b"7\n"}, "7"),
    "cls before json": ({"cls": b"7", "json": b'{"label": 3}'}, "7"),
    "none": ({"json": b'{"caption": "a cat"}'}, None),
    "-1": ({"json": b'{"label": -1}'}, None),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_labels_beside_images_in_shards(tmp_path, kind):
    members, expected = MEMBERS[kind]
    files = {"0.cls": b"x", "0.png": png(0), "1.png": png(1)} | {
        f"1.{suffix}": data for suffix, data in members.items()
    }
    pack_tar(tmp_path / f"x-{0}.tar", files)
    found, _ = named(tmp_path / "x-0.tar", tmp_path / "x.beton")
    assert found == ["x", expected]


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_a_label_that_is_a_link_is_said_and_not_lost(tmp_path, suffix):
    path = pack_tar(tmp_path / "x-0.tar", {"0.cls": b"x", "0.png": png(0), "1.png": png(1)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo(f"1.{suffix}")
        link.type, link.linkname = tarfile.LNKTYPE, "0.cls"
        archive.addfile(link)
    with pytest.raises(UserError, match=rf"its label cannot be read: '1\.{suffix}' is a hard link"):
        convert(path, tmp_path / "x.beton", on_error="fail")
    found, _ = named(path, tmp_path / "x.beton", on_error="skip")
    assert found == ["x"]
    assert convert(path, tmp_path / "y.beton", split="unlabeled").count == 2


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "-1", "nan", "3.0", "1e9", " x ", "\0", "9" * 30, "٣", "e\u0301"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.binary(max_size=4),
)


@settings(deadline=None)
@given(VALUES)
def test_any_value_is_a_label_or_a_sentence(value):
    try:
        label = read_label(value)
    except ValueError as error:
        assert str(error)  # noqa: PT017
        return
    assert label == -1 or (isinstance(label, int) and label >= 0) or label == label.strip() != ""


@settings(deadline=None)
@given(st.lists(st.integers(-1, 10**17) | st.sampled_from(["a", "b", "10", "9"]), max_size=20))
def test_numbering_keeps_apart_what_differs(labels):
    classes, labels_N = number_labels(labels)
    assert [None if n < 0 else classes[n] for n in labels_N] == [None if x == -1 else str(x) for x in labels]
    assert len(classes) == len({str(x) for x in labels} - {"-1"})
    assert classes == sorted_names(classes)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(VALUES.filter(lambda v: not isinstance(v, bytes)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_tables_of_any_labels_end_in_classes_or_a_clear_error(tmp_path_factory, values, seed):
    """The same values as a .csv, a Parquet column and .json members."""
    folder = tmp_path_factory.mktemp("labels")
    tree(folder, {f"{i}.png": png(i) for i in range(len(values))})
    rng = random.Random(seed)
    with open(folder / "x.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.writer(file, delimiter=rng.choice(",;\t|"))
        writer.writerow(["path", "label"] if rng.random() < 0.8 else ["file", rng.choice(["", "kind", "split"])])
        writer.writerows([f"{i}.png", "" if value is None else value] for i, value in enumerate(values))
    sources = [folder / "x.csv"]
    try:
        column = pa.array(values)
        parquet.write_table(
            pa.table({"image": [png(i) for i in range(len(values))], "label": column}), folder / "x.parquet"
        )
        sources.append(folder / "x.parquet")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass  # no such column can be made
    members = {}
    for i, value in enumerate(values):
        members[f"{i}.png"] = png(i)
        members[f"{i}.json"] = json.dumps({"label": value}).encode()
    sources.append(pack_tar(folder / "x.tar", members))
    for path in sources:
        try:
            convert(path, folder / "out.beton", workers=1, on_error=rng.choice(["fail", "skip"]))
        except UserError as error:
            assert error.what  # noqa: PT017
            assert error.fix  # noqa: PT017


def test_hugging_face_names_belong_to_their_numbers_and_others_are_refused(tmp_path):
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for labels, said in (([1, 0, -1, None], None), ([1, 2, 0, 0], "class 2, and names 2 classes")):
        table = pa.table({"image": [png(i) for i in range(4)], "label": pa.array(labels)})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, tmp_path / "x.parquet")
        if said is None:
            assert named(tmp_path / "x.parquet", tmp_path / "x.beton")[0] == ["dog", "cat", None, None]
        else:
            with pytest.raises(UserError, match=said):
                convert(tmp_path / "x.parquet", tmp_path / "x.beton")


def test_one_folder_named_as_a_given_class_is_that_class(tmp_path):
    tree(tmp_path / "in", {f"cat/{i}.png": png(i) for i in range(3)})
    assert named(tmp_path / "in", tmp_path / "x.beton")[0] == [None] * 3  # a wrapper
    assert named(tmp_path / "in", tmp_path / "x.beton", classes=["dog", "cat"])[0] == ["cat"] * 3
    pack_tar(tmp_path / "x.tar", {f"cat/{i}.png": png(i) for i in range(3)})
    assert named(tmp_path / "x.tar", tmp_path / "x.beton", classes=["dog", "cat"])[0] == ["cat"] * 3


def test_choices_name_what_is_there(tmp_path):
    tree(tmp_path, {"a.png": png(1)})
    (tmp_path / "x.csv").write_text("path,label\na.png,x\n")
    with pytest.raises(UserError, match="no column 'kind'") as error:
        open_source(tmp_path / "x.csv", choices=Choices(label_column="kind"))
    assert "path, label" in error.value.fix


def test_names_with_dots_keep_the_members_of_a_sample_together(tmp_path):
    files = {}
    for i in range(40):  # several cuts of the one key that all have
        members = {"cls": str(i % 7).encode(), "json": b"{}", "jpg": png(i)}
        files |= {f"ds.{i:06}.{suffix}": data for suffix, data in members.items()}
    for shard in (0, 1):
        pack_tar(tmp_path / f"ds-{shard}.tar", files)
    found = list(open_source(tmp_path / "ds-{0..1}.tar").items())
    assert [item.label for item in found] == [i % 7 for i in range(40)] * 2
