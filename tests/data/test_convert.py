"""Conversion: the pictures and labels that went in come out, once, in order, with true figures."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_sources import pack_tar, png, tree

from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.data.convert.convert import convert
from fastssl.data.convert.labels import read_classes
from fastssl.data.sources import open_source
from fastssl.errors import UserError

CIFAR = Path(__file__).parents[2] / "../shared/data/cifar10_jpeg.tar.xz"


def noise(folder, count=30, classes=3, low=8, high=20):
    """PNG files of varied sizes in class folders; returns {relative name: pixels}."""
    rng = np.random.default_rng(0)
    images = {}
    for i in range(count):
        name = f"{'abcdefgh'[i % classes]}/{i:03d}.png"
        size = (*rng.integers(low, high, 2), 3) if high > low else (low, low, 3)
        images[name] = rng.integers(0, 256, size, np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[name]).save(folder / name)
    return dict(sorted(images.items()))


def test_pixels_labels_and_figures(tmp_path):
    images = noise(tmp_path / "in")
    manifest = convert(tmp_path / "in", tmp_path / "out.beton")
    beton = Beton(tmp_path / "out.beton")
    assert len(beton) == manifest.count == 30
    for i, (name, image_HWC) in enumerate(images.items()):
        np.testing.assert_array_equal(beton.image(i), image_HWC)
        assert manifest.classes[beton.labels[i]] == name[0]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images.values()]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(0), rtol=0, atol=1e-12)
    sizes = np.array([image.shape[:2] for image in images.values()])
    assert manifest.size_min_px == tuple(sizes.min(0).tolist())
    assert manifest.size_max_px == tuple(sizes.max(0).tolist())
    assert manifest.side_px is None
    assert manifest.class_counts == (
        10,
        10,
        10,
    )
    assert json.loads((tmp_path / "out.beton.json").read_text()) == manifest.to_json()


def test_every_road_leads_to_the_same_file(tmp_path):
    """Workers, archive or folder, Indexed or Stream: same bytes, same digest."""
    noise(tmp_path / "in", low=8, high=8)
    files = {str(p.relative_to(tmp_path / "in")): p.read_bytes() for p in sorted((tmp_path / "in").rglob("*.png"))}
    pack_tar(tmp_path / "in.tar.gz", dict(sorted(files.items())), "w:gz")
    reference = convert(tmp_path / "in", tmp_path / "0.beton", workers=1)
    for i, (source, workers) in enumerate(
        [(tmp_path / "in", 4), (tmp_path / "in.tar.gz", 1), (tmp_path / "in.tar.gz", 3)], 1
    ):
        manifest = convert(source, tmp_path / f"{i}.beton", workers=workers)
        assert manifest.digest == reference.digest
        assert (tmp_path / f"{i}.beton").read_bytes() == (tmp_path / "0.beton").read_bytes()


def test_a_stream_numbers_classes_by_name_not_by_appearance(tmp_path):
    path = pack_tar(tmp_path / "x.tar", {"w/zebra/0.png": png(1), "w/ant/0.png": png(2), "w/bee/0.png": png(3)})
    manifest = convert(path, tmp_path / "out.beton")
    assert manifest.classes == (
        "ant",
        "bee",
        "zebra",
    )
    beton = Beton(tmp_path / "out.beton")
    assert beton.labels.tolist() == [2, 0, 1]
    assert [int(beton.image(i)[0, 0, 0]) for i in range(3)] == [1, 2, 3]


def test_digest_depends_on_order_pixels_and_labels(tmp_path):
    files = [("a/0.png", png(1)), ("a/1.png", png(2)), ("b/2.png", png(3))]
    variants = [
        files,
        [files[1], files[0], files[2]],
        [("a/0.png", png(9)), *files[1:]],
        [("b/0.png", png(1)), *files[1:]],
    ]
    digests = []
    for i, variant in enumerate(variants):
        path = pack_tar(tmp_path / f"{i}.tar", dict(variant))
        digests.append(convert(path, tmp_path / "out.beton").digest)
    assert len(set(digests)) == len(variants)


def test_side_px_makes_one_square_size(tmp_path):
    noise(tmp_path / "in")
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", side_px=8)
    assert manifest.side_px == 8
    assert Beton(tmp_path / "out.beton").raw_images().shape == (30, 8, 8, 3)


def test_shapes_convert_to_what_the_source_holds(tmp_path):
    manifest = convert("shapes", tmp_path / "s.beton", count=100, side_px=24, seed=5)
    source = open_source("shapes", count=100, side_px=24, seed=5)
    images = Beton(tmp_path / "s.beton").raw_images()
    np.testing.assert_array_equal(images, np.stack([source.read(i).data for i in range(100)]))
    assert len(manifest.classes) == 10


def test_progress_ends_at_the_count(tmp_path):
    noise(tmp_path / "in")
    seen = []
    convert(tmp_path / "in", tmp_path / "out.beton", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)
    assert seen == sorted(seen)


def test_broken_images_fail_with_their_name_or_are_counted(tmp_path):
    noise(tmp_path / "in")
    tree(tmp_path / "in", {"b/000broken.png": b"not a picture", "c/999.jpg": b"\xff\xd8\xff\xe0 nor this"})
    with pytest.raises(UserError, match=r"b/000broken\.png"):
        convert(tmp_path / "in", tmp_path / "out.beton")
    assert os.listdir(tmp_path) == ["in"]
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    assert (manifest.count, manifest.skipped_count) == (30, 2)
    assert [entry.key for entry in manifest.skipped] == ["b/000broken.png", "c/999.jpg"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_an_interruption_leaves_the_earlier_file_and_nothing_else(tmp_path, kind):
    noise(tmp_path / "in", count=2000, low=8, high=8)
    source = tmp_path / "in"
    if kind == "tar":
        files = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*.png"))}
        source = pack_tar(tmp_path / "in.tar", files)
    out = tmp_path / "deep" / "er" / "out.beton"
    convert(source, out)
    before = out.read_bytes()

    def interrupt(done, total):
        raise KeyboardInterrupt

    for target in (out, tmp_path / "new" / "folder" / "x.beton"):
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, progress=interrupt)
    assert out.read_bytes() == before
    assert sorted(os.listdir(out.parent)) == ["out.beton", "out.beton.json"]
    assert not (tmp_path / "new").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith(("convert", "tar"))]


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "x"},
        {"format": "x"},
        {"mode": "x"},
        {"on_error": "x"},
        {"side_px": 0},
        {"workers": 0},
        {"limit": 0},
        {"fraction": 1.5},
        {"shard_mb": float("nan"), "format": "webdataset"},
        {"shard_mb": -1.0, "format": "webdataset"},
    ],
)
def test_wrong_options_are_named_and_write_nothing(tmp_path, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        convert("shapes", tmp_path / "out" / "x.beton", **{"count": 10, **bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not CIFAR.exists(), reason="needs ../shared/data/cifar10_jpeg.tar.xz")
@pytest.mark.parametrize(("split", "per_class"), [("train", 5000), ("test", 1000)])
def test_cifar_jpegs_from_their_archive(tmp_path, split, per_class):
    import tarfile

    manifest = convert(CIFAR, tmp_path / "out.beton", split=split)
    assert manifest.class_counts == (per_class,) * 10
    assert manifest.side_px == 32
    np.testing.assert_allclose(manifest.mean, (0.4914, 0.4822, 0.4465), atol=0.005)
    beton = Beton(tmp_path / "out.beton")
    with tarfile.open(CIFAR) as archive:
        for index in range(3):
            for member in archive:
                if member.name == f"{split}/airplane/{index:04d}.jpg":
                    expected = np.asarray(Image.open(archive.extractfile(member)))
                    break
            assert np.abs(beton.image(index).astype(int) - expected).max() <= 4  # libjpeg's own builds differ
    assert manifest.classes[beton.labels[per_class * 3]] == "cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 PNGs of 8 px in three classes of 30, 20 and 10."""
    path = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(1)
    for i in range(60):
        name = path / "aaabbc"[i % 6] / f"{i:03d}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(name)
    return path


def converted(source, out, **options):
    """The stored images as bytes, their labels, and the manifest."""
    manifest = convert(source, out, **options)
    beton = Beton(out)
    return [beton.image(i).tobytes() for i in range(len(beton))], beton.labels.tolist(), manifest


def test_fractions_and_limits_keep_every_class_in_its_share(folder, tmp_path):
    whole, _, manifest = converted(folder, tmp_path / "whole.beton")
    assert manifest.class_counts == (
        30,
        20,
        10,
    )
    half, _, manifest = converted(folder, tmp_path / "half.beton", fraction=0.5, seed=3)
    assert manifest.class_counts == (
        15,
        10,
        5,
    )
    assert half == [image for image in whole if image in set(half)]  # in the source's own order
    tenth, _, manifest = converted(folder, tmp_path / "tenth.beton", limit=6, seed=3)
    assert manifest.class_counts == (
        3,
        2,
        1,
    )
    assert set(tenth) < set(half)
    other, _, _ = converted(folder, tmp_path / "other.beton", limit=6, seed=4)
    assert set(tenth) != set(other)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_validation_split_is_held_out_and_the_rest_is_whole(folder, tmp_path, kind):
    source = folder if kind == "folder" else as_tar(folder, tmp_path / "x.tar.xz", "w:xz")
    whole, _, _ = converted(folder, tmp_path / "whole.beton")
    train, _, manifest = converted(source, tmp_path / "train.beton", val_count=12)
    val = Beton(tmp_path / "train.val.beton")
    held_out = {val.image(i).tobytes() for i in range(len(val))}
    assert np.bincount(val.labels).tolist() == [6, 4, 2]
    assert manifest.class_counts == (
        24,
        16,
        8,
    )
    assert not held_out & set(train)
    assert held_out | set(train) == set(whole)
    assert json.loads((tmp_path / "train.val.beton.json").read_text())["count"] == 12
    with pytest.raises(UserError, match="val_count"):
        convert(source, tmp_path / "no.beton", val_count=60)


def as_tar(folder, path, mode="w"):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}
    return pack_tar(path, files, mode)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_shuffled_storing_permutes_images_with_their_labels(folder, tmp_path, kind):
    source = folder if kind == "folder" else as_tar(folder, tmp_path / "x.tar")
    whole, labels, _ = converted(folder, tmp_path / "whole.beton")
    mixed, mixed_labels, _ = converted(source, tmp_path / "mixed.beton", shuffle=True, seed=1)
    assert mixed != whole
    assert dict(zip(mixed, mixed_labels, strict=True)) == dict(zip(whole, labels, strict=True))
    assert converted(folder, tmp_path / "again.beton", shuffle=True, seed=1)[0] == mixed
    assert converted(folder, tmp_path / "other.beton", shuffle=True, seed=2)[0] != mixed


def test_classes_may_be_given_to_match_another_set(folder, tmp_path):
    _, labels, _ = converted(folder, tmp_path / "x.beton")
    _, moved, manifest = converted(folder, tmp_path / "y.beton", classes=["z", "c", "b", "a"])
    assert manifest.classes == (
        "z",
        "c",
        "b",
        "a",
    )
    assert [3 - label for label in labels] == moved
    with pytest.raises(UserError, match="not in the given list: b, c"):
        convert(folder, tmp_path / "z.beton", classes=["a"])


def photographs(folder, count=4, quality=80):
    """Smooth JPEGs of 60x40; one of them turned by EXIF, one CMYK. Returns {name: file}."""
    from PIL import Image

    folder.mkdir()
    y, x = np.mgrid[:40, :60]
    for i in range(count):
        pixels = np.stack([127 + 100 * np.sin(x / (5 + i)), 4.0 * x, 6.0 * y], -1).astype(np.uint8)
        picture = Image.fromarray(pixels)
        exif = Image.Exif()
        if i == 1:
            exif[0x0112] = 6
        picture = picture.convert("CMYK") if i == 2 else picture
        picture.save(folder / f"{i}.jpg", quality=quality, exif=exif)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_jpegs_that_need_no_change_keep_their_bytes(tmp_path):
    files = list(photographs(tmp_path / "in").values())
    convert(tmp_path / "in", tmp_path / "out.beton", mode="jpg")
    beton = Beton(tmp_path / "out.beton")
    stored = [bytes(beton.encoded(i)[1]) for i in range(4)]
    assert [a == b for a, b in zip(stored, files, strict=True)] == [True, False, False, True]
    assert beton.sizes.tolist() == [[40, 60], [60, 40], [40, 60], [40, 60]]
    raw = tmp_path / "raw.beton"
    convert(tmp_path / "in", raw)
    for i in range(4):
        assert np.abs(beton.image(i).astype(int) - Beton(raw).image(i)).mean() < 4
    manifest = convert(tmp_path / "in", tmp_path / "small.beton", mode="jpg", max_side_px=30, quality=95)
    assert manifest.size_max_px == (30, 30)
    convert(tmp_path / "in", tmp_path / "smart.beton", mode="smart")
    assert Beton(tmp_path / "smart.beton").is_raw  # 7,200 bytes of pixels are below the threshold


def test_stored_jpegs_have_the_statistics_of_their_pixels(tmp_path):
    photographs(tmp_path / "in")
    jpg = convert(tmp_path / "in", tmp_path / "jpg.beton", mode="jpg")
    raw = convert(tmp_path / "in", tmp_path / "raw.beton")
    assert jpg.mean == raw.mean
    assert jpg.std == raw.std


KINDS = {
    "gray.png": ("L", np.uint8),
    "palette.png": ("P", np.uint8),
    "alpha.png": ("RGBA", np.uint8),
    "deep.png": ("I;16", np.uint16),
    "deep.tif": ("I;16", np.uint16),
    "color.webp": ("RGB", np.uint8),
    "color.bmp": ("RGB", np.uint8),
    "first.gif": ("P", np.uint8),
    "progressive.jpg": ("RGB", np.uint8),
}


@pytest.mark.parametrize(("dtype", "full"), [("uint8", 255), ("uint16", 65535)])
def test_every_kind_of_image_becomes_the_same_color(tmp_path, dtype, full):
    (tmp_path / "in").mkdir()
    for name, (mode, kind) in KINDS.items():
        if kind == np.uint16:
            picture = Image.fromarray(np.full((9, 9), 0x8080, np.uint16))
        else:
            picture = Image.new("RGB", (9, 9), (128, 128, 128))
            picture = picture.quantize() if mode == "P" else picture.convert(mode)
        options = {"progressive": True, "quality": 95} if name.endswith("jpg") else {}
        picture.save(tmp_path / "in" / name, **({"lossless": True} if name.endswith("webp") else options))
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", dtype=dtype)
    beton = Beton(tmp_path / "out.beton")
    assert manifest.count == len(KINDS)
    for i, name in enumerate(sorted(KINDS)):
        image_HWC = beton.image(i)
        assert image_HWC.shape == (9, 9, 3)
        assert image_HWC.dtype == dtype
        assert np.abs(image_HWC / full - 128 / 255).max() < 0.01, name


def test_gray_and_many_channels(tmp_path):
    convert("shapes", tmp_path / "gray.beton", channels=1, count=10)
    assert Beton(tmp_path / "gray.beton").image(0).shape == (32, 32, 1)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 65536, (4, 6, 6, 5), np.uint16))
    convert(tmp_path / "x.npy", tmp_path / "five.beton", channels=5, dtype="uint16")
    np.testing.assert_array_equal(Beton(tmp_path / "five.beton").raw_images(), np.load(tmp_path / "x.npy"))
    with pytest.raises(UserError, match="has 5 channels"):
        convert(tmp_path / "x.npy", tmp_path / "three.beton", dtype="uint16")


@pytest.mark.parametrize("kind", ["folder", "tar", "shapes"])
@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("torn", [b"a torn record", bytes(4096)], ids=["torn", "zeros"])
def test_resume_goes_on_where_it_stopped_and_ends_with_the_same_file(tmp_path, kind, when, torn):
    noise(tmp_path / "in", count=300, low=8, high=8)
    source = {"folder": tmp_path / "in", "tar": tmp_path / "x.tar", "shapes": "shapes"}[kind]
    if kind == "tar":
        as_tar(tmp_path / "in", source)
    options = {"count": 300, "limit": 299} if kind == "shapes" else {}
    reference = convert(source, tmp_path / "whole.beton", **options)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == when:
            raise KeyboardInterrupt

    out = tmp_path / "out.beton"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, resume=True, progress=interrupt, workers=1, **options)
    assert calls[-1] < 299
    assert sorted(p.name for p in tmp_path.glob("*out*")) == [".out.beton.resume"]
    with open(tmp_path / ".out.beton.resume", "ab") as file:
        file.write(torn)
    prepared = count_prepared(source, out, options)
    assert prepared == reference.count - (calls[-2] if when > 1 else 0)  # the run that was interrupted is lost
    assert out.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert json.loads((tmp_path / "out.beton.json").read_text()) == reference.to_json()
    assert not (tmp_path / ".out.beton.resume").exists()


def test_a_second_conversion_with_the_same_journal_is_refused(tmp_path):
    refused = []

    def again(done, total):
        with pytest.raises(UserError, match=r"Another process is converting to .*out\.beton") as error:
            convert("shapes", tmp_path / "out.beton", count=200, resume=True)
        refused.append(error.value)

    convert("shapes", tmp_path / "out.beton", count=200, resume=True, progress=again)
    assert refused
    assert len(Beton(tmp_path / "out.beton")) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.beton", "out.beton.json"]


def count_prepared(source, out, options):
    """Resume, and say how many items had still to be prepared."""
    from unittest import mock

    from fastssl.data.convert import chunks, prepare

    counts = []

    def counting(items, shape):
        run = prepare.prepare(items, shape)
        counts.append(len(run.data))
        return run

    with mock.patch.object(chunks, "prepare", counting):
        convert(source, out, resume=True, **options)
    return sum(counts)


def test_an_image_that_was_mended_is_read_again(tmp_path):
    noise(tmp_path / "in", count=40, low=8, high=8)
    path = tmp_path / "in" / "c" / "038.png"
    sound = path.read_bytes()
    path.write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match=r"038\.png"):
            convert(tmp_path / "in", tmp_path / "out.beton", resume=True)
    path.write_bytes(sound)
    convert(tmp_path / "in", tmp_path / "out.beton", resume=True)
    convert(tmp_path / "in", tmp_path / "fresh.beton")
    assert (tmp_path / "out.beton").read_bytes() == (tmp_path / "fresh.beton").read_bytes()


def test_a_failure_with_a_validation_split_leaves_both_earlier_files(folder, tmp_path):
    convert(folder, tmp_path / "o.beton", val_count=12)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def interrupt(done, total):
        calls.append(total)
        if total == 12:  # the second of the two files
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "o.beton", val_count=12, seed=5, progress=interrupt)
    assert {48, 12} == set(calls)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_journal_of_other_options_is_not_believed(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("shapes", tmp_path / "o.beton", count=200, seed=1, resume=True, progress=interrupt)
    convert("shapes", tmp_path / "o.beton", count=200, seed=2, resume=True)
    convert("shapes", tmp_path / "fresh.beton", count=200, seed=2)
    assert (tmp_path / "o.beton").read_bytes() == (tmp_path / "fresh.beton").read_bytes()


STUCK = """
import sys, time
from fastssl.data.convert.convert import convert

def wait(done, total):
    print(done, flush=True)
    time.sleep(600)

convert("shapes", sys.argv[1], count=2000, progress=wait, format=sys.argv[2], workers=1)
"""


@pytest.mark.skipif(os.name != "posix", reason="no way to ask whether a process lives")
@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_what_a_killed_conversion_left_goes_with_the_next_one_and_nothing_else_does(tmp_path, format):
    """Two real processes stopped in the middle of writing, of which one is killed."""
    out = tmp_path / "out"
    started = [
        subprocess.Popen([sys.executable, "-c", STUCK, str(out), format], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        assert all(int(process.stdout.readline()) > 0 for process in started)
        killed, alive = started
        killed.kill()
        killed.wait()

        def hidden(process):
            return [name for name in os.listdir(tmp_path) if f".{process.pid}." in name]

        assert hidden(killed)
        living = hidden(alive)
        others = [".out.beton.77.0123abcd.part", f".out.01234567.{killed.pid}.0123abcd.part", ".out.resume"]
        for name in others:  # of another version, of another machine, and what --resume needs
            (tmp_path / name).touch()
        convert("shapes", tmp_path / "another", count=20, format=format)
        assert hidden(killed)
        convert("shapes", out, count=20, format=format)
        assert not [name for name in hidden(killed) if name not in others]
        assert hidden(alive) == living
        assert {*others, "out", "out.json"} <= set(os.listdir(tmp_path))
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    """Peak of Python's own allocations over sets of one size and of four times that."""
    import tracemalloc

    monkeypatch.setattr("fastssl.data.convert.chunks._RUN_BYTES", 1 << 20)
    peaks = []
    for count in (500, 2000):
        tracemalloc.start()
        convert("shapes", tmp_path / "x.beton", count=count, side_px=64, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_000_000  # the difference in pixels is 18 MB


def test_large_images_after_small_ones_do_not_fill_the_memory(tmp_path, monkeypatch):
    """A run that was sized for thumbnails gives back what it cannot hold; nothing is lost or moved."""
    import tracemalloc

    monkeypatch.setattr("fastssl.data.convert.prepare.FULL_BYTES", 1 << 20)
    for i in range(120):
        side_px = 4 if i < 60 else 500  # 750 kB of pixels
        name = tmp_path / "in" / f"{i:03d}.png"
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (side_px, side_px), (i, 0, 0)).save(name)
    as_tar(tmp_path / "in", tmp_path / "in.tar")
    convert("shapes", tmp_path / "warm-up.beton", count=2, side_px=4)  # what compiles and loads is not the images'
    for source in (tmp_path / "in", tmp_path / "in.tar"):
        tracemalloc.start()
        convert(source, tmp_path / "out.beton", workers=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        beton = Beton(tmp_path / "out.beton")
        assert [int(beton.image(i)[0, 0, 0]) for i in range(120)] == list(range(120))
        assert peak < 12_000_000  # of 45 MB


def test_classes_are_read_from_a_manifest_a_file_or_a_list(tmp_path):
    noise(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "a.beton")
    (tmp_path / "names.txt").write_text("c\na\n\nb\n")
    assert read_classes(str(tmp_path / "a.beton.json")) == ("a", "b", "c")
    assert read_classes(str(tmp_path / "names.txt")) == ("c", "a", "b")
    assert read_classes("b, c,a") == ("b", "c", "a")
    assert read_classes("lonely") == ("lonely",)
    for wrong, said in (("a,b,a", "'a' twice"), (",", "no class"), (str(tmp_path / "absent.json"), "cannot be read")):
        with pytest.raises(UserError, match=said):
            read_classes(wrong)


def test_a_signal_between_opening_the_output_and_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(writer: BetonWriter) -> BetonWriter:
        for file in (writer._file, writer._records, writer._table):
            file.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(BetonWriter, "__enter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("shapes", tmp_path / "out" / "a.beton", count=20, side_px=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"source": np.zeros((4, 8, 8, 3), np.uint8)}, "source of images is a ndarray, not a path"),
        ({"source": None}, "source of images is a NoneType"),
        ({"out": 3}, "out is a int"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"dtype": np.uint8}, "dtype is <class 'numpy.uint8'>"),
        ({"side_px": "16"}, "side_px is '16'"),
        ({"side_px": 16.5}, r"side_px is 16\.5"),
        ({"quality": 1000}, "quality is 1000"),
        ({"background": (255, 255, 255)}, r"background is \(255, 255, 255\)"),
        ({"classes": "c,b,a"}, "classes is 'c,b,a', a text"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        convert(**{"source": "shapes", "out": tmp_path / "x.beton", "count": 4} | arguments)
    assert not list(tmp_path.iterdir())
