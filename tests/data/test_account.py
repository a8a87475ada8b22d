"""What counts as an image and as a split; whatever is passed over is said, and two readings are refused."""

import errno
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.data.sources.account import Account
from fastssl.data.sources.base import split_of
from fastssl.data.sources.choices import Choices
from fastssl.data.sources.folders import walk
from fastssl.errors import UserError
from tests.data.test_sources import contents, pack_tar, pack_zip, png, tree

wds = pytest.importorskip("webdataset")


def pixel_values(path):
    beton = Beton(path)
    return [int(beton.image(i)[0, 0, 0]) for i in range(len(beton))]


def made(tmp_path, kind, files):
    if kind == "folder":
        return tree(tmp_path / "in", files)
    pack = pack_zip if kind == "zip" else pack_tar
    return pack(tmp_path / f"in.{kind}", files)


KINDS = ["folder", "tar", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_account_names_everything_that_was_passed_over(tmp_path, kind):
    files = {"a/0.png": png(1), "b/1.png": png(2), "a/x.txt": b"", "a/y.TXT": b"", "b/film.mp4": b"", "README": b""}
    machines = {
        "a/@eaDir/0.png": png(3),
        "ground_truth/a.png": png(3),
        "b/thumbnails/1.png": png(3),
        ".x/a.png": png(3),
    }
    manifest = convert(made(tmp_path, kind, files | machines), tmp_path / "out.beton")
    assert pixel_values(tmp_path / "out.beton") == [1, 2]
    assert manifest.classes == ("a", "b")
    passed = manifest.account["passed_over"]
    assert sum(passed.values()) == 8
    assert {".txt file": 2, ".mp4 file": 1, "file without a suffix": 1}.items() <= passed.items()
    assert json.loads((tmp_path / "out.beton.json").read_text())["account"] == manifest.account


@pytest.mark.parametrize("kind", KINDS)
def test_splits_below_the_classes(tmp_path, kind):
    files = {f"{c}/{s}/{i}.png": png(i) for c in ("cat", "dog") for s in ("train", "test") for i in range(2)}
    path = made(tmp_path, kind, files)
    for split in ("train", "test"):
        found, classes = contents(open_source(path, split=split))
        assert classes == ("cat", "dog")
        assert {key: label for key, (_, label) in found.items()} == {
            name: name.partition("/")[0] for name in files if f"/{split}/" in name
        }


@pytest.mark.parametrize("kind", KINDS)
def test_folders_on_both_sides_of_a_split_are_refused(tmp_path, kind):
    files = {f"{c}/train/{d}/0.png": png(1) for c in ("cat", "dog") for d in ("x", "y")}
    with pytest.raises(UserError, match="above its split folders and below"):
        contents(open_source(made(tmp_path, kind, files)))


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *(
            (word, "train")
            for word in ("train", "Train", "training", "train2017", "seg_train", "train.X1", "training_set")
        ),
        *((word, "val") for word in ("val", "valid", "validation", "val2017", "images_val")),
        *((word, "test") for word in ("test", "testing", "seg_test", "test_set")),
        *((word, None) for word in ("bullet_train", "trainer", "testament", "valley", "seg_pred", "contest", "")),
    ],
)
def test_words_that_name_a_split(word, split):
    assert split_of(word) == split


def labels_by_split(path, splits=("train", "test")):
    """{split: {file name: class}}, and the class names, the same for each."""
    opened = {split: contents(open_source(path, split=split)) for split in splits}
    (classes,) = {classes for _, classes in opened.values()}
    return {s: {key: label for key, (_, label) in found.items()} for s, (found, _) in opened.items()}, classes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/train", "test/test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train", "test/images"),
        ("wrapper/train/a/b", "wrapper/test"),
    ],
)
def test_each_split_has_a_wrapper_of_its_own(tmp_path, kind, train, test):
    files = {f"{train}/cat/0.png": png(0), f"{train}/dog/0.png": png(1), f"{test}/cat/1.png": png(2)}
    labels, classes = labels_by_split(made(tmp_path, kind, files))
    assert classes == ("cat", "dog")
    assert labels["train"] == {f"{train}/cat/0.png": "cat", f"{train}/dog/0.png": "dog"}
    assert labels["test"] == {f"{test}/cat/1.png": "cat"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_the_only_one_of_its_split_stays_a_class(tmp_path, kind):
    files = {"train/cat/0.png": png(0), "test/cat/0.png": png(1), "test/dog/0.png": png(2)}
    labels, classes = labels_by_split(made(tmp_path, kind, files))
    assert classes == ("cat", "dog")
    assert labels["train"] == {"train/cat/0.png": "cat"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, -1])
def test_splits_lie_below_the_folders_that_all_images_share(tmp_path, kind, order):
    """As tar packs a folder that it is given by its full path."""
    names = [f"home/me/data/pets/{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(2)]
    path = made(tmp_path, kind, {name: png(0) for name in names[::order]})
    labels, classes = labels_by_split(path)
    assert classes == ("cat", "dog")
    for split in labels:
        assert labels[split] == {name: name.split("/")[5] for name in names if f"/{split}/" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("above", ["", "home/me/data/pets/"])
@pytest.mark.parametrize("classes", [("cat",), ("cat", "dog"), ("bus", "train")])
def test_the_only_split_is_still_one(tmp_path, kind, above, classes):
    path = made(tmp_path, kind, {f"{above}test/{c}/0.png": png(0) for c in classes})
    found, _ = contents(open_source(path, split="test"))
    assert len(found) == len(classes)
    with pytest.raises(UserError, match="no images for split 'train'"):
        contents(open_source(path))


@pytest.mark.parametrize("kind", KINDS)
def test_splits_too_deep_to_be_found_are_no_classes(tmp_path, kind):
    files = {f"test/pets/{s}/{c}/0.png": png(0) for s in ("train", "test") for c in ("cat", "dog")}
    path = made(tmp_path, kind, files | {"test/pets/extra/0.png": png(1)})
    with pytest.raises(UserError, match="folders called test and train where its class folders are"):
        contents(open_source(path, split="test"))


@pytest.mark.parametrize("kind", KINDS)
def test_train_in_parts_is_one_split(tmp_path, kind):
    files = {f"train.X{i}/n0{i}/0.png": png(i) for i in (1, 2)} | {"val.X/n01/0.png": png(3)}
    found, classes = contents(open_source(made(tmp_path, kind, files)))
    assert classes == ("n01", "n02")
    assert sorted(label for _, label in found.values()) == ["n01", "n02"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_val_is_no_class_and_is_refused_on_its_own(tmp_path, kind):
    """As tiny-imagenet has it."""
    files = {f"train/n0{c}/images/{i}.png": png(i) for c in range(3) for i in range(2)}
    path = made(tmp_path, kind, files | {f"val/images/{i}.png": png(i) for i in range(3)})
    found, classes = contents(open_source(path))
    assert classes == ("n00", "n01", "n02")
    assert len(found) == 6
    with pytest.raises(UserError, match="none of train's classes"):
        contents(open_source(path, split="val"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_spellings_of_a_name_are_one_class(tmp_path, kind):
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    path = made(tmp_path, kind, {f"{name}/{i}.png": png(i) for i, name in enumerate(names)} | {"tea/3.png": png(3)})
    found, classes = contents(open_source(path))
    assert classes == ("caf\u00e9", "tea")
    assert len(found) == 3


def test_two_links_to_one_folder_count_once(tmp_path):
    tree(tmp_path / "real", {"cat/0.png": png(1), "dog/0.png": png(2)})
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "real" / "cat")
    (tmp_path / "in" / "dog").symlink_to(tmp_path / "real" / "dog")
    source = open_source(tmp_path / "in")
    assert [source.read(i).key for i in range(len(source))] == ["a/0.png", "dog/0.png"]
    assert source.account.passed_over["link to a folder that was entered already"] == 1


def test_a_folder_goes_before_the_links_to_it(tmp_path):
    tree(tmp_path / "in", {"zebra/0.png": png(1)})
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "zebra")
    source = open_source(tmp_path / "in")
    assert [source.read(i).key for i in range(len(source))] == ["zebra/0.png"]


def test_folders_are_entered_in_order_and_links_last_with_few_calls(tmp_path, monkeypatch):
    count = 200
    tree(tmp_path / "in", {f"{i:03d}/0.png": png(1) for i in range(count)} | {"000/z/0.png": png(2)})
    tree(tmp_path / "real", {"x/0.png": png(3), "y/0.png": png(4)})
    (tmp_path / "in" / "000" / "a").symlink_to(tmp_path / "real" / "x")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "real")
    calls, is_symlink = [], Path.is_symlink
    monkeypatch.setattr(Path, "is_symlink", lambda path: calls.append(path) or is_symlink(path))
    names = list(walk(tmp_path / "in", Account(), {}))
    first = ["000/0.png", "000/z/0.png", *(f"{i:03d}/0.png" for i in range(1, count))]
    assert names == [*first, "000/a/0.png", "b/y/0.png"]
    assert len(calls) < 2 * count


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_the_system_are_passed_over_and_counted(tmp_path, kind):
    names = ["lost+found", "System Volume Information", "$RECYCLE.BIN", "#recycle"]
    files = {"cat/0.png": png(1), "dog/1.png": png(2)} | {f"{name}/cat/0.png": png(3) for name in names}
    source = open_source(made(tmp_path, kind, files))
    found, classes = contents(source)
    assert (set(found), classes) == ({"cat/0.png", "dog/1.png"}, ("cat", "dog"))
    assert source.account.passed_over.total() == 4


def refuse_to_list(monkeypatch, folder):
    """As without permissions, which the administrator always has."""
    scandir = os.scandir

    def refusing(path):
        if path == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_an_unreadable_folder_is_listed_or_skipped(tmp_path, monkeypatch):
    folder = tree(tmp_path / "in", {f"{c}/{i}.png": png(i) for i, c in enumerate(("cat", "cow", "dog"))})
    refuse_to_list(monkeypatch, folder / "cow")
    with pytest.raises(UserError, match="cow' cannot be read: Permission denied"):
        convert(folder, tmp_path / "out.beton")
    manifest = convert(folder, tmp_path / "out.beton", on_error="skip")
    assert (manifest.count, manifest.classes, manifest.skipped_count) == (2, ("cat", "dog"), 1)
    assert manifest.skipped[0].key == "cow"
    refuse_to_list(monkeypatch, folder)
    with pytest.raises(UserError, match="in' cannot be read: Permission denied"):
        open_source(folder)


def test_a_link_to_itself_is_listed_or_skipped(tmp_path):
    folder = tree(tmp_path / "in", {"cat/0.png": png(1), "dog/1.png": png(2)})
    for name in ("cat/loop", "dog/loop.png"):
        (folder / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=r"loop\.png' cannot be read: Too many levels"):
        convert(folder, tmp_path / "out.beton")
    manifest = convert(folder, tmp_path / "out.beton", on_error="skip")
    assert (manifest.count, [entry.key for entry in manifest.skipped]) == (2, ["dog/loop.png"])
    assert manifest.account["passed_over"] == {"file without a suffix": 1}


def test_a_zip_with_back_slashes_has_folders(tmp_path):
    path = pack_zip(tmp_path / "x.zip", {"train\\cat\\0.png": png(1), "train\\dog\\0.png": png(2)})
    found, classes = contents(open_source(path))
    assert classes == ("cat", "dog")
    assert found["train/dog/0.png"][1] == "dog"


def test_class_folders_beside_a_tar_are_refused_with_both_readings(tmp_path):
    tree(tmp_path / "in", {"cat/0.png": png(1), "dog/0.png": png(2)})
    pack_tar(tmp_path / "in" / "old.tar", {"cat/0.png": png(1)})
    with pytest.raises(UserError, match=r"2 ways: tar files \(old\.tar\) or image files \(0\.png\)"):
        open_source(tmp_path / "in")


def test_class_tars_are_refused_with_both_readings(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("n01440764", "n01443537"):
        pack_tar(tmp_path / "in" / f"{name}.tar", {f"{name}_{i}.png": png(i) for i in range(2)})
    with pytest.raises(UserError, match="shards of unlabeled images, or as one tar per class"):
        open_source(tmp_path / "in")
    numbered = tmp_path / "shards"
    numbered.mkdir()
    for i in range(2):
        pack_tar(numbered / f"part-{i:03d}.tar", {f"{i}_{j}.png": png(j) for j in range(2)})
    assert len(list(open_source(numbered).items())) == 4


def test_json_beside_images_of_class_folders_leaves_the_folders_their_say(tmp_path):
    files = {f"{c}/{i}.{s}": d for c in "ab" for i in range(2) for s, d in (("png", png(i)), ("json", b'{"width": 4}'))}
    found, classes = contents(open_source(pack_tar(tmp_path / "x.tar", files)))
    assert classes == ("a", "b")
    assert len(found) == 4


def test_names_with_dots_are_images_of_their_own(tmp_path):
    files = {f"photo.{i:03d}.png": png(i) for i in range(12)} | {"0.cls": b"x"}
    (tmp_path / "in").mkdir()
    pack_tar(tmp_path / "in" / "a-0.tar", {"z.png": png(20), "z.cls": b"x"} | files)
    items = list(open_source(tmp_path / "in").items())
    assert [item.key for item in items] == ["a-0.tar/z", *(f"a-0.tar/photo.{i:03d}" for i in range(12))]


def test_samples_are_those_that_webdataset_makes(tmp_path):
    files = {}
    for i in range(5):
        files |= {f"{i:03d}.seg.png": png(100 + i), f"{i:03d}.png": png(i), f"{i:03d}.cls": str(i).encode()}
    path = pack_tar(tmp_path / "x-0.tar", files)
    with open(path, "rb") as file:
        members = [member | {"__url__": str(path)} for member in wds.tariterators.tar_file_iterator(file)]
    samples = list(wds.tariterators.group_by_keys(members))
    items = list(open_source(path).items())
    assert [item.data for item in items] == [sample["png"] for sample in samples]
    assert [item.label for item in items] == [int(sample["cls"]) for sample in samples]
    masks = list(open_source(path, choices=Choices(image_key="seg.png")).items())
    assert [item.data for item in masks] == [sample["seg.png"] for sample in samples]


def test_a_sample_of_two_images_asks_which(tmp_path):
    path = pack_tar(tmp_path / "x-0.tar", {"0.left.png": png(1), "0.right.png": png(2), "0.cls": b"3"})
    with pytest.raises(UserError, match=r"several images: left\.png, right\.png") as error:
        list(open_source(path).items())
    assert "image_key=" in error.value.fix
    (item,) = open_source(path, choices=Choices(image_key="right.png")).items()
    assert item.data == png(2)


def bad_files(folder):
    tree(folder, {f"a/{i}.png": png(i) for i in range(6)})
    for i in (1, 3):
        (folder / f"a/{i}.png").write_bytes(b"\x89PNG\r\n" + bytes(30))
    (folder / "a" / "5.jpg").write_bytes(b"nothing")
    return folder


def test_all_bad_files_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        convert(bad_files(tmp_path / "in"), tmp_path / "out.beton")
    assert error.value.what.startswith("3 of 7 images")
    assert all(name in error.value.what for name in ("a/1.png", "a/3.png", "a/5.jpg"))
    assert " at 0x" not in error.value.what
    assert "on_error='skip'" in error.value.fix
    assert not list(tmp_path.glob("*out*"))
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    assert pixel_values(tmp_path / "out.beton") == [0, 2, 4, 5]
    assert [entry.key for entry in manifest.skipped] == ["a/1.png", "a/3.png", "a/5.jpg"]
    assert " at 0x" not in (tmp_path / "out.beton.json").read_text()


def test_check_reads_everything_and_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="3 of 7 images"):
        convert(bad_files(tmp_path / "in"), None, check=True)
    manifest = convert(tmp_path / "in", None, check=True, on_error="skip")
    assert (manifest.count, manifest.skipped_count) == (4, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    assert manifest.digest == convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip").digest


def test_nothing_is_overwritten_unasked(tmp_path):
    convert("shapes", tmp_path / "x.beton", count=4)
    before = (tmp_path / "x.beton").read_bytes()
    with pytest.raises(UserError, match="exists already") as error:
        convert("shapes", tmp_path / "x.beton", count=8, overwrite=False)
    assert "overwrite=True" in error.value.fix
    assert (tmp_path / "x.beton").read_bytes() == before


@pytest.mark.parametrize("options", [{"format": "webdataset"}, {"format": "webdataset", "val_count": 2}, {}])
def test_a_file_with_the_name_of_the_manifest_is_not_overwritten_unasked(tmp_path, options):
    out = tmp_path / "train"
    record = tmp_path / ("train.val.json" if "val_count" in options else "train.json")
    record.write_text('{"learning_rate": 1}')
    with pytest.raises(UserError, match=rf"{record.name} exists already") as error:
        convert("shapes", out, count=8, overwrite=False, **options)
    assert "overwrite=True" in error.value.fix
    assert record.read_text() == '{"learning_rate": 1}'
    assert list(tmp_path.iterdir()) == [record]
    convert("shapes", out, count=8, **options)
    assert json.loads(record.read_text())["count"] in (2, 8)


def test_a_manifest_whose_file_is_gone_is_replaced(tmp_path):
    convert("shapes", tmp_path / "x.beton", count=4)
    (tmp_path / "x.beton").unlink()
    assert convert("shapes", tmp_path / "x.beton", count=8, overwrite=False).count == 8


def test_resume_notices_that_one_file_deep_inside_changed(tmp_path):
    folder = tree(tmp_path / "in", {f"a/deep/{i}.png": png(i) for i in range(100)})

    def interrupt(done, total):
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out.beton", resume=True, progress=interrupt, workers=1)
    path = folder / "a" / "deep" / "3.png"
    path.write_bytes(png(200))
    os.utime(path, ns=(1, 1))
    manifest = convert(folder, tmp_path / "out.beton", resume=True, workers=1)
    assert "changed" in " ".join(manifest.account["notes"])
    assert sorted(pixel_values(tmp_path / "out.beton")) == sorted([*(i for i in range(100) if i != 3), 200])


def test_a_split_column_is_counted(tmp_path):
    tree(tmp_path, {f"{i}.png": png(i) for i in range(4)})
    (tmp_path / "x.csv").write_text("path,label,split\n0.png,a,train\n1.png,b,train2017\n2.png,a,val\n3.png,a,test\n")
    manifest = convert(tmp_path / "x.csv", tmp_path / "x.beton")
    assert np.all(Beton(tmp_path / "x.beton").labels == [0, 1])
    assert sum(manifest.account["splits"].values()) == 4


def test_a_beton_with_integers_but_no_labels_asks_which_they_are(tmp_path):
    convert(tree(tmp_path / "in", {"a/0.png": png(1), "b/1.png": png(2)}), tmp_path / "x.beton")
    path = tmp_path / "ffcv.beton"
    path.write_bytes((tmp_path / "x.beton").read_bytes().replace(b"label", b"idx\0\0", 1))
    with pytest.raises(UserError, match="no field 'label', but integers in: idx"):
        open_source(path)
    assert open_source(path, choices=Choices(label_column="idx")).labels_N.tolist() == [0, 1]
    assert open_source(path, split="unlabeled").labels_N.tolist() == [-1, -1]
    with pytest.raises(UserError, match="no integer field 'target'"):
        open_source(path, choices=Choices(label_column="target"))
