"""Sources whose samples lie in arrays, columns, lists and shards: same pictures, same labels, splits kept apart."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from test_sources import contents, pack_tar, png, tree

from fastssl.data.beton.reader import BetonWriter
from fastssl.data.sources import open_source
from fastssl.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2])


def pixels(source):
    found, classes = contents(source)
    return np.stack([data for data, _ in found.values()]), [name for _, name in found.values()], classes


@pytest.mark.parametrize("shape", ["NHWC", "NCHW", "NHW"])
def test_npy_is_mapped_in_any_usual_order_of_axes(tmp_path, shape):
    saved = {"NHWC": IMAGES, "NCHW": IMAGES.transpose(0, 3, 1, 2), "NHW": IMAGES[..., 0]}[shape]
    np.save(tmp_path / "x.npy", saved)
    found, labels, classes = pixels(open_source(tmp_path / "x.npy"))
    np.testing.assert_array_equal(found, IMAGES if shape != "NHW" else IMAGES[..., :1])
    assert (set(labels), classes) == ({None}, ())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "names",
    [
        {"images": "train", "labels": "train"},
        {"x_train": "train", "y_train": "train", "x_test": "test", "y_test": "test"},
        {"train_images": "train", "train_labels": "train", "val_images": "val", "val_labels": "val"},
    ],
)
def test_npz_by_usual_names(tmp_path, save, names):
    def content(key, split):
        order = slice(None) if split == "train" else slice(None, None, -1)
        is_label = "label" in key or key.startswith("y")
        return LABELS[order, None] if is_label else np.ascontiguousarray(IMAGES[order])

    save(tmp_path / "x.npz", **{key: content(key, split) for key, split in names.items()})
    for split in ("train", "test", "val"):
        order = slice(None) if split == "train" else slice(None, None, -1)
        if split in names.values():
            found, labels, classes = pixels(open_source(tmp_path / "x.npz", split=split))
            np.testing.assert_array_equal(found, IMAGES[order])
            assert labels == [str(label) for label in LABELS[order]]
            assert classes == ("0", "1", "2")
        else:
            with pytest.raises(UserError, match=f"no images for split '{split}'"):
                open_source(tmp_path / "x.npz", split=split)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array(["dog", " cat ", ""]), ["dog", "cat", None]),
        (np.array([b"dog", b"cat", b"dog"]), ["dog", "cat", "dog"]),
        (np.array([3.0, np.nan, 1.0]), ["3", None, "1"]),
        (np.array([7, -1, 10**9]), ["7", None, "1000000000"]),
        (np.array([True, False, True]), ["1", "0", "1"]),
    ],
    ids=["text", "bytes", "floats", "negative and large", "bools"],
)
def test_npz_labels_of_any_type(tmp_path, labels, names):
    np.savez(tmp_path / "x.npz", images=IMAGES[:3], labels=labels)
    found, read, _ = pixels(open_source(tmp_path / "x.npz"))
    assert read == names
    np.testing.assert_array_equal(found, IMAGES[:3])


def test_npz_labels_that_are_none_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES[:3], labels=np.array([1.0, 1.5, 2.0]))
    with pytest.raises(UserError, match=r"x\.npz: 1 values of labels are no labels, first .*1\.5"):
        open_source(tmp_path / "x.npz")


def test_arrays_that_cannot_be_images(tmp_path):
    np.save(tmp_path / "float.npy", IMAGES / 255)
    np.save(tmp_path / "flat.npy", IMAGES.reshape(-1))
    np.savez(tmp_path / "fortran.npz", images=np.asfortranarray(IMAGES))
    np.savez(tmp_path / "other.npz", weights=LABELS)
    np.savez(tmp_path / "short.npz", images=IMAGES, labels=LABELS[:2])
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 not a zip")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name):
            open_source(path)


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("a.png,dog\nb/c.png,cat\n", ["dog", "cat"], ("cat", "dog")),
        ("path,label\na.png,1\nb/c.png,0\n", ["1", "0"], ("0", "1")),
        ("\ufefflabel,id,filename\ndog,7,a.png\ncat,8,b/c.png\n", ["dog", "cat"], ("cat", "dog")),
        ("a.png\nb/c.png\n", [None, None], ()),
        ("file,class,split\nx,y,test\na.png,dog,train\nb/c.png,dog,Train\n", ["dog", "dog"], ("dog",)),
    ],
)
def test_csv(tmp_path, text, labels, classes):
    tree(tmp_path, {"a.png": png(1), "b/c.png": png(2)})
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    found, found_classes = contents(open_source(tmp_path / "list.csv"))
    assert list(found.values()) == list(zip([png(1), png(2)], labels, strict=True))
    assert found_classes == classes


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_a_class_that_a_split_lacks_does_not_renumber_the_others(tmp_path, kind):
    rows = {"train": [2, 0, 10, 2], "test": [10, 2], "val": [7, 0]}
    if kind == "npz":
        arrays = {f"{split}_images": IMAGES[: len(labels)] for split, labels in rows.items()}
        np.savez(tmp_path / "x.npz", **arrays, **{f"{split}_labels": np.array(rows[split]) for split in rows})
    else:
        tree(tmp_path, {f"{i}.png": png(i) for i in range(4)})
        lines = [f"{i}.png,{label},{split}" for split, labels in rows.items() for i, label in enumerate(labels)]
        (tmp_path / "x.csv").write_text("\n".join(["path,label,split", *lines]))
    for split, labels in rows.items():
        found, classes = contents(open_source(tmp_path / f"x.{kind}", split=split))
        assert classes == ("0", "2", "7", "10")
        assert [name for _, name in found.values()] == [str(label) for label in labels]


@pytest.mark.parametrize(
    "name", ["pets{}.csv", "pets{}.npy", "pets{}.npz", "pets{}.beton", "pets{}.tar", "pets{}.parquet"]
)
def test_a_file_that_is_not_divided_is_one_split(tmp_path, name):
    def made(word: str) -> Path:
        path = tmp_path / name.format(word)
        match path.suffix:
            case ".csv":
                tree(tmp_path, {"a.png": png(1)})
                path.write_text("a.png,dog\n")
            case ".npy":
                np.save(path, IMAGES)
            case ".npz":
                np.savez(path, images=IMAGES, labels=LABELS)
            case ".beton":
                with BetonWriter(path) as writer:
                    writer.add(IMAGES[0], 0)
            case ".tar":
                pack_tar(path, {"0.png": png(1), "0.cls": b"0"})
            case ".parquet":
                pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
                parquet.write_table(pa.table({"image": [png(1)], "label": [0]}), path)
        return path

    undivided, test = made(""), made("-test")
    for split in ("train", "unlabeled"):
        open_source(undivided, split=split)
    for split in ("test", "val"):
        with pytest.raises(UserError, match=f"no images for split '{split}'"):
            open_source(undivided, split=split)
    open_source(test, split="test")
    with pytest.raises(UserError, match="no images for split 'val'"):
        open_source(test, split="val")


def test_csv_mistakes(tmp_path):
    for text, message in (("path,label\n", "names no images"), ("path,label\na.png\n", "1 lines of too few fields")):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("absent.png,cat\n")
    assert isinstance(open_source(tmp_path / "list.csv").read(0).data, ValueError)


def test_beton_yields_what_it_stores_and_the_names_next_to_it(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        for image, label in zip(IMAGES, LABELS, strict=True):
            writer.add(image, int(label))
    found, labels, classes = pixels(open_source(tmp_path / "x.beton"))
    np.testing.assert_array_equal(found, IMAGES)
    assert (labels, classes) == ([str(label) for label in LABELS], ("0", "1", "2"))
    (tmp_path / "x.beton.json").write_text(json.dumps({"classes": ["ant", "bee", "cow"]}))
    assert pixels(open_source(tmp_path / "x.beton"))[2] == ("ant", "bee", "cow")


FILES = [png(i) for i in range(6)]


def table(kind, labels):
    pa = pytest.importorskip("pyarrow")
    if kind == "struct":
        images = pa.array([{"bytes": f, "path": f"{i}.png"} for i, f in enumerate(FILES)])
    else:
        images = pa.array(FILES, pa.binary())
    return pa.table({"id": list(range(6)), "image": images, "label": labels})


def named(pa_table, names):
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return pa_table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_parquet_in_hugging_faces_layout(tmp_path, kind):
    parquet = pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    data.mkdir()
    train = named(table(kind, LABELS.tolist()), ["ant", "bee", "cow"])
    parquet.write_table(train.slice(0, 4), data / "train-00000-of-00002.parquet", row_group_size=2)
    parquet.write_table(train.slice(4), data / "train-00001-of-00002.parquet")
    parquet.write_table(train.slice(0, 1), data / "test-00000-of-00001.parquet")
    found, classes = contents(open_source(tmp_path))
    names = ["ant", "bee", "cow"]
    assert list(found.values()) == [(f, names[label]) for f, label in zip(FILES, LABELS, strict=True)]
    assert classes == tuple(names)
    assert len(contents(open_source(tmp_path, split="test"))[0]) == 1
    assert open_source(tmp_path).count == 6


def test_parquet_labels_by_name_by_bare_number_and_absent(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table("struct", ["dog", "cat", "dog", None, "cat", "dog"]), tmp_path / "x.parquet")
    found, classes = contents(open_source(tmp_path / "x.parquet"))
    assert [name for _, name in found.values()] == ["dog", "cat", "dog", None, "cat", "dog"]
    assert classes == ("cat", "dog")
    parquet.write_table(table("struct", LABELS.tolist()).drop_columns("label"), tmp_path / "x.parquet")
    assert {name for _, name in contents(open_source(tmp_path / "x.parquet"))[0].values()} == {None}
    parquet.write_table(table("struct", LABELS.tolist()).drop_columns("image"), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column of image bytes, only id \(int64\), label"):
        open_source(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(tmp_path / "x.parquet")


def save_to_disk(folder, *tables):
    """What Hugging Face's `Dataset.save_to_disk` leaves behind, a file for each table."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, one in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, one.schema) as stream:
            stream.write_table(one, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_hugging_face_data_sets_on_disk(tmp_path):
    train = named(table("struct", LABELS.tolist()), ["ant", "bee", "cow"])
    save_to_disk(tmp_path / "one", train)
    found, classes = contents(open_source(tmp_path / "one"))
    assert [data for data, _ in found.values()] == FILES
    assert classes == ("ant", "bee", "cow")
    save_to_disk(tmp_path / "many" / "train", train)
    save_to_disk(tmp_path / "many" / "validation", train.slice(0, 2))
    (tmp_path / "many" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert len(contents(open_source(tmp_path / "many", split="val"))[0]) == 2
    with pytest.raises(UserError, match="Set split to one of: train, val"):
        open_source(tmp_path / "many", split="test")


def test_files_of_a_data_set_on_disk_that_differ_are_refused(tmp_path):
    rows = table("struct", LABELS.tolist())
    cow, cat = named(rows, ["ant", "bee", "cow"]), named(rows, ["ant", "bee", "cat"])
    save_to_disk(tmp_path / "same", cow, cow)
    assert len(list(open_source(tmp_path / "same").items())) == 2 * len(FILES)
    save_to_disk(tmp_path / "others", cow, cow, cat)
    with pytest.raises(UserError, match="ant, bee, cat instead of ant, bee, cow") as error:
        open_source(tmp_path / "others")
    assert "data-00002-of-00003.arrow differs from data-00000-of-00003.arrow" in error.value.what


def sample(key, value, **parts):
    return {f"{key}.png": png(value), **{f"{key}.{suffix}": data for suffix, data in parts.items()}}


def test_webdataset_shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    pack_tar(folder / "set-train-000.tar", sample("a/0", 1, cls=b"2") | sample("a/1", 2, cls=b"0\n"))
    pack_tar(folder / "set-train-001.tar", sample("b", 3, json=b'{"label": 1}') | sample("c", 4))
    pack_tar(folder / "set-test-000.tar", sample("d", 5, cls=b"1"))
    expected = [(png(1), "2"), (png(2), "0"), (png(3), "1"), (png(4), None)]
    for path in (folder, folder / "set-train-{000..001}.tar"):
        source = open_source(path)
        items = list(source.items())
        assert [item.data for item in items] == [data for data, _ in expected]
        assert [item.label for item in items] == [2, 0, 1, -1]
    assert [item.label for item in open_source(folder, split="test").items()] == [1]
    with pytest.raises(UserError, match=r"set-train-002\.tar"):
        open_source(folder / "set-train-{000..002}.tar")


def test_one_tar_of_samples_is_told_from_a_folder(tmp_path):
    path = pack_tar(tmp_path / "x.tar", sample("0", 1, cls=b"dog") | sample("1", 2, cls=b"cat"))
    source = open_source(path)
    found, classes = contents(source)
    assert list(found.values()) == [(png(1), "dog"), (png(2), "cat")]
    assert classes == ("cat", "dog")


def test_a_label_that_cannot_be_read_spoils_its_sample_only(tmp_path):
    path = pack_tar(tmp_path / "x.tar", sample("0", 1, cls=b"1") | sample("1", 2, json=b"{") | sample("2", 3, cls=b"0"))
    items = list(open_source(path).items())
    assert [isinstance(item.data, Exception) for item in items] == [False, True, False]


def test_npz_streams_its_images_one_by_one(tmp_path):
    """A stream of 64 MB of images does not need 64 MB."""
    import tracemalloc

    np.savez(tmp_path / "x.npz", images=np.zeros((1000, 128, 512, 1), np.uint8))
    source = open_source(tmp_path / "x.npz")
    tracemalloc.start()
    assert sum(item.data.nbytes for item in source.items()) == 65_536_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_images_of_a_source_stay_readable_as_files():
    """The helper's PNG is a PNG: a guard on the tests themselves."""
    from PIL import Image

    assert Image.open(io.BytesIO(png(7))).getpixel((0, 0)) == (7, 7, 7)
