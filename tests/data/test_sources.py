"""Every source yields the same pictures under the same labels, in a stated order."""

import contextlib
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastssl.data.convert.labels import Numbering
from fastssl.data.sources import Indexed, Stream, open_source
from fastssl.data.sources.choices import Choices
from fastssl.errors import UserError


def png(value: int, side_px: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side_px, side_px, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def tree(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def pack_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def pack_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def contents(source):
    """{key: (data, class name or None)} and the class names, whatever the kind of source."""
    if isinstance(source, Indexed):
        items = [source.read(i) for i in range(len(source))]
        assert [item.label for item in items] == source.labels_N.tolist()
    else:
        items = list(source.items())
    numbering = Numbering(source)
    numbering.number(item.label for item in items)
    classes, labels_N = numbering.finish()
    assert len({item.key for item in items}) == len(items)
    labeled = zip(items, labels_N, strict=True)
    found = {item.key: (item.data, None if label < 0 else classes[label]) for item, label in labeled}
    return found, classes


LAYOUT = {
    "train/dog/0.png": png(1),
    "train/cat/0.png": png(2),
    "train/cat/deep/er/1.PNG": png(3),
    "test/dog/0.png": png(4),
    "test/ant/0.png": png(5),
    "unlabeled/0.png": png(6),
    "train/cat/notes.txt": b"no picture",
    "train/cat/.hidden.png": b"no picture",
    "__MACOSX/train/cat/._0.png": b"no picture",
}
EXPECTED = {
    "train": {"train/cat/0.png": "cat", "train/cat/deep/er/1.PNG": "cat", "train/dog/0.png": "dog"},
    "test": {"test/ant/0.png": "ant", "test/dog/0.png": "dog"},
    "unlabeled": {"unlabeled/0.png": None},
}
PACKERS = {
    "folder": lambda path, files: tree(path / "folder", files),
    "tar": lambda path, files: pack_tar(path / "x.tar", files),
    "tar.gz": lambda path, files: pack_tar(path / "x.tar.gz", files, "w:gz"),
    "tar.xz": lambda path, files: pack_tar(path / "x.tar.xz", files, "w:xz"),
    "tar.bz2": lambda path, files: pack_tar(path / "x.tar.bz2", files, "w:bz2"),
    "zip": lambda path, files: pack_zip(path / "x.zip", files),
}
kinds = pytest.mark.parametrize("kind", PACKERS)


@kinds
@pytest.mark.parametrize("wrapper", ["", "wrapper/"])
@pytest.mark.parametrize("split", ["train", "test", "unlabeled"])
def test_splits_and_class_folders(tmp_path, kind, wrapper, split):
    path = PACKERS[kind](tmp_path, {wrapper + name: data for name, data in LAYOUT.items()})
    found, classes = contents(open_source(path, split=split))
    expected = {wrapper + name: (LAYOUT[name], label) for name, label in EXPECTED[split].items()}
    assert found == expected
    if split != "unlabeled":  # a class that one split lacks does not renumber the others
        assert classes == ("ant", "cat", "dog")


@pytest.mark.parametrize("spelling", ["unlabeled", "unlabelled"])
def test_both_spellings_of_the_unlabeled_folder_are_read(tmp_path, spelling):
    path = tree(tmp_path / "folder", {"train/a/0.png": png(0), f"{spelling}/0.png": png(1)})
    found, _ = contents(open_source(path, split="unlabeled"))
    assert list(found) == [f"{spelling}/0.png"]


@kinds
def test_without_split_folders_all_is_train(tmp_path, kind):
    path = PACKERS[kind](tmp_path, {"b/0.png": png(0), "a/0.png": png(1), "a/sub/2.png": png(2)})
    found, classes = contents(open_source(path))
    assert {key: label for key, (_, label) in found.items()} == {
        "b/0.png": "b",
        "a/0.png": "a",
        "a/sub/2.png": "a",
    }
    assert classes == ("a", "b")
    with pytest.raises(UserError, match="no images for split 'test'"):
        contents(open_source(path, split="test"))


@kinds
@pytest.mark.parametrize("prefix", ["", "only/", "train/", "wrapper/train/"])
def test_flat_pictures_have_no_label(tmp_path, kind, prefix):
    path = PACKERS[kind](tmp_path, {f"{prefix}{i}.png": png(i) for i in range(3)})
    found, classes = contents(open_source(path))
    assert {label for _, label in found.values()} == {None}
    assert classes == ()


@kinds
def test_a_missing_split_names_those_that_exist(tmp_path, kind):
    path = PACKERS[kind](tmp_path, LAYOUT)
    with pytest.raises(UserError, match="test, train, unlabeled"):
        contents(open_source(path, split="val"))


@kinds
def test_no_pictures_at_all(tmp_path, kind):
    path = PACKERS[kind](tmp_path, {"readme.txt": b"hello"})
    with pytest.raises(UserError, match="holds no image files"):
        contents(open_source(path))


def test_folder_order_is_by_name_and_links_are_followed_once(tmp_path):
    folder = tree(tmp_path / "set", {"b/1.png": png(1), "a/2.png": png(2), "a/10.png": png(10)})
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "c").mkdir()
    (folder / "c" / "link.png").symlink_to(folder / "b" / "1.png")
    source = open_source(folder)
    assert [source.read(i).key for i in range(len(source))] == [
        "a/10.png",
        "a/2.png",
        "b/1.png",
        "c/link.png",
    ]


def test_long_names_and_every_tar_dialect(tmp_path):
    name = "train/" + "ü" * 90 + "/" + "x" * 150 + "\n.png"
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        long = name if dialect != tarfile.USTAR_FORMAT else "train/" + "d" * 120 + "/" + "x" * 80 + ".png"
        path = tmp_path / f"{dialect}.tar"
        with tarfile.open(path, "w", format=dialect) as archive:
            member = tarfile.TarInfo(long)
            member.size = len(png(1))
            archive.addfile(member, io.BytesIO(png(1)))
        found, _ = contents(open_source(path))
        assert list(found) == [long]


def test_shapes_splits_differ_and_repeat():
    train, again, test = (open_source("shapes", split=s, count=20) for s in ("train", "train", "test"))
    np.testing.assert_array_equal(train.read(7).data, again.read(7).data)
    assert not np.array_equal(train.read(7).data, test.read(7).data)
    assert (open_source("shapes", split="unlabeled", count=5).labels_N == -1).all()


def fake_cifar(root, monkeypatch, kind, batches, label_key):
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    cls = getattr(datasets, kind)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    images = {}
    for attribute, names in batches.items():
        entries = []
        for seed, name in enumerate(names):
            planes = np.random.default_rng(seed).integers(0, 256, (4, 3, 32, 32), np.uint8)
            with open(folder / name, "wb") as file:
                pickle.dump({"data": planes.reshape(4, -1), label_key: [3, 1, 2, 0]}, file)
            images.setdefault(attribute, []).append(planes.transpose(0, 2, 3, 1))
            entries.append([name, calculate_md5(folder / name)])
        monkeypatch.setattr(cls, attribute, entries)
    with open(folder / cls.meta["filename"], "wb") as file:
        pickle.dump({cls.meta["key"]: ["zebra", "ant", "cow", "bee"]}, file)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": calculate_md5(folder / cls.meta["filename"])})
    return {attribute: np.concatenate(parts) for attribute, parts in images.items()}


@pytest.mark.parametrize(
    ("name", "kind", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar_files_of_torchvision(tmp_path, monkeypatch, name, kind, key):
    batches = {"train_list": ["data_batch_1", "data_batch_2"], "test_list": ["test_batch"]}
    images = fake_cifar(tmp_path, monkeypatch, kind, batches, key)
    for split, count in (("train", 8), ("test", 4)):
        source = open_source(name, split=split, root=tmp_path)
        assert len(source) == count
        for i in range(count):
            np.testing.assert_array_equal(source.read(i).data, images[f"{split}_list"][i])
        assert source.labels_N.tolist() == [3, 1, 2, 0] * (count // 4)
        assert source.classes == (
            "zebra",
            "ant",
            "cow",
            "bee",
        )  # the publisher's order is the label's meaning


def test_stl10_files_of_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    truth = {}
    for stem in ("train", "test", "unlabeled"):
        truth[stem] = np.random.default_rng(len(stem)).integers(0, 256, (3, 96, 96, 3), np.uint8)
        truth[stem].transpose(0, 3, 2, 1).tofile(folder / f"{stem}_X.bin")
        np.array([1, 2, 1], np.uint8).tofile(folder / f"{stem}_y.bin")
    for attribute in ("train_list", "test_list"):
        names = [entry[0] for entry in getattr(datasets.STL10, attribute)]
        monkeypatch.setattr(datasets.STL10, attribute, [[n, calculate_md5(folder / n)] for n in names])
    for split, stem, labels in (("train", "train", [0, 1, 0]), ("unlabeled", "unlabeled", [-1] * 3)):
        source = open_source("stl10", split=split, root=tmp_path)
        assert source.labels_N.tolist() == labels
        np.testing.assert_array_equal(np.stack([source.read(i).data for i in range(3)]), truth[stem])
    (folder / "train_X.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is not in"):
        open_source("stl10", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_absent_files_say_what_to_fetch_and_where_to_put_it(tmp_path, name):
    with pytest.raises(UserError) as caught:
        open_source(name, root=tmp_path / "none")
    assert "http" in caught.value.fix
    assert str(tmp_path) in caught.value.fix
    assert "\n" not in caught.value.what + caught.value.fix
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_download_without_network_is_two_lines(tmp_path, monkeypatch, name):
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network\nhere")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as caught:
        open_source(name, root=tmp_path, download=True)
    assert len(str(caught.value).splitlines()) == 2
    assert "no network here" in caught.value.what


def test_unknown_names_and_kinds(tmp_path):
    with pytest.raises(UserError, match="no file, folder or known source 'cifar11'"):
        open_source("cifar11")
    (tmp_path / "x.doc").write_bytes(b"?")
    with pytest.raises(UserError, match="Unsupported file type"):
        open_source(tmp_path / "x.doc")
    with pytest.raises(UserError, match="no split 'trian'"):
        open_source("shapes", split="trian")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"count": 5}, "count (data.count in a recipe): the source"),
        ({"root": "elsewhere"}, "root (data.root in a recipe): the source"),
        ({"choices": Choices(label_column="y")}, "label_column: a folder of images has no use for it."),
        ({"choices": Choices(image_column="x", image_key="jpg", classes=("a",))}, "image_column and image_key: "),
    ],
)
def test_options_that_a_source_has_no_use_for_are_refused(tmp_path, options, what):
    tree(tmp_path, {"train/a/0.png": png(1)})
    with pytest.raises(UserError) as caught:
        open_source(tmp_path, **options)
    assert caught.value.what.startswith(what)
    assert len(open_source(tmp_path, choices=Choices(classes=("a",))).labels_N) == 1


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("shapes", set()),
        ("cifar10", set()),
        ("x.csv", {"image_column", "label_column", "image_root"}),
        ("x.zip", set()),
        ("x.npy", set()),
    ],
)
def test_each_source_takes_its_own_choices_alone(tmp_path, name, taken):
    pack_zip(tmp_path / "x.zip", {"a/0.png": png(1)})
    (tmp_path / "x.csv").write_text("file,label\n0.png,a\n")
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 3), np.uint8))
    given = {"image_column": "file", "label_column": "label", "image_root": tmp_path, "image_key": "png"}
    for choice in given:
        source = tmp_path / name if "." in name else name
        with pytest.raises(UserError) if choice not in taken else contextlib.nullcontext() as caught:
            open_source(source, choices=Choices(**{choice: given[choice]}))
        assert choice in taken or caught.value.what.startswith(f"{choice}: ")


def test_tar_is_streamed_and_says_so(tmp_path):
    source = open_source(pack_tar(tmp_path / "x.tar", LAYOUT))
    assert isinstance(source, Stream)
    assert [item.key for item in source.items()] == [item.key for item in source.items()]


@kinds
@pytest.mark.parametrize("stray", ["", "wrapper/"])
def test_a_class_called_like_a_split_is_asked_about_and_a_stray_picture_is_not(tmp_path, kind, stray):
    ambiguous = {"wrapper/bus/0.png": png(0), "wrapper/train/0.png": png(1), "wrapper/truck/0.png": png(2)}
    path = PACKERS[kind](tmp_path, ambiguous)
    with pytest.raises(UserError, match="'wrapper/bus'"):
        contents(open_source(path))
    other = tmp_path / "other"
    other.mkdir()
    stray_files = {"wrapper/train/a/0.png": png(1), "wrapper/train/b/0.png": png(2), f"{stray}logo.png": png(3)}
    found, classes = contents(open_source(PACKERS[kind](other, stray_files)))
    assert list(found) == ["wrapper/train/a/0.png", "wrapper/train/b/0.png"]
    assert classes == ("a", "b")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_concatenated_archives_are_read_to_the_end(tmp_path, suffix):
    """As `cat a.tar b.tar` makes them; the oracle is tarfile with ignore_zeros."""
    mode = "w:" + suffix[4:]
    parts = [pack_tar(tmp_path / label, {f"{label}/{i}.png": png(i) for i in range(3)}, mode) for label in "ab"]
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(path, ignore_zeros=True) as archive:
        names = [member.name for member in archive]
    assert [item.key for item in open_source(path).items()] == names
    assert len(names) == 6
