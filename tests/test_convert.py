"""Conversion: the pictures and labels that went in come out, once, in order, with true figures beside them."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import pack_tar, png, tree

from fastssl.data.beton import Beton
from fastssl.data.convert import convert
from fastssl.data.sources import open_source
from fastssl.errors import UserError

CIFAR = Path(__file__).parents[1] / "../shared/data/cifar10_jpeg.tar.xz"


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
    assert len(beton) == manifest["count"] == 30
    for i, (name, image_HWC) in enumerate(images.items()):
        np.testing.assert_array_equal(beton.image(i), image_HWC)
        assert manifest["classes"][beton.labels[i]] == name[0]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images.values()]) / 255
    np.testing.assert_allclose(manifest["mean"], pixels.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(manifest["std"], pixels.std(0), rtol=0, atol=1e-12)
    sizes = np.array([image.shape[:2] for image in images.values()])
    assert manifest["size_min_px"] == sizes.min(0).tolist()
    assert manifest["size_max_px"] == sizes.max(0).tolist()
    assert manifest["side_px"] is None
    assert manifest["class_counts"] == [10, 10, 10]
    assert json.loads((tmp_path / "out.beton.json").read_text()) == manifest


def test_every_road_leads_to_the_same_file(tmp_path):
    """Workers, archive or folder, Indexed or Stream: same bytes, same digest."""
    noise(tmp_path / "in", low=8, high=8)
    files = {
        str(p.relative_to(tmp_path / "in")): p.read_bytes() for p in sorted((tmp_path / "in").rglob("*.png"))
    }
    pack_tar(tmp_path / "in.tar.gz", dict(sorted(files.items())), "w:gz")
    reference = convert(tmp_path / "in", tmp_path / "0.beton", workers=1)
    for i, (source, workers) in enumerate(
        [(tmp_path / "in", 4), (tmp_path / "in.tar.gz", 1), (tmp_path / "in.tar.gz", 3)], 1
    ):
        manifest = convert(source, tmp_path / f"{i}.beton", workers=workers)
        assert manifest["digest"] == reference["digest"]
        assert (tmp_path / f"{i}.beton").read_bytes() == (tmp_path / "0.beton").read_bytes()


def test_a_stream_numbers_classes_by_name_not_by_appearance(tmp_path):
    path = pack_tar(
        tmp_path / "x.tar", {"w/zebra/0.png": png(1), "w/ant/0.png": png(2), "w/bee/0.png": png(3)}
    )
    manifest = convert(path, tmp_path / "out.beton")
    assert manifest["classes"] == ["ant", "bee", "zebra"]
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
        digests.append(convert(path, tmp_path / "out.beton")["digest"])
    assert len(set(digests)) == len(variants)


def test_side_px_makes_one_square_size(tmp_path):
    noise(tmp_path / "in")
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", side_px=8)
    assert manifest["side_px"] == 8
    assert Beton(tmp_path / "out.beton").raw_images().shape == (30, 8, 8, 3)


def test_shapes_convert_to_what_the_source_holds(tmp_path):
    manifest = convert("shapes", tmp_path / "s.beton", count=100, side_px=24, seed=5)
    source = open_source("shapes", count=100, side_px=24, seed=5)
    images = Beton(tmp_path / "s.beton").raw_images()
    np.testing.assert_array_equal(images, np.stack([source.read(i).data for i in range(100)]))
    assert len(manifest["classes"]) == 10


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
    assert (manifest["count"], manifest["skipped_count"]) == (30, 2)
    assert [entry["key"] for entry in manifest["skipped"]] == ["b/000broken.png", "c/999.jpg"]


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
    assert manifest["class_counts"] == [per_class] * 10
    assert manifest["side_px"] == 32
    np.testing.assert_allclose(manifest["mean"], (0.4914, 0.4822, 0.4465), atol=0.005)
    beton = Beton(tmp_path / "out.beton")
    with tarfile.open(CIFAR) as archive:
        for index in range(3):
            for member in archive:
                if member.name == f"{split}/airplane/{index:04d}.jpg":
                    expected = np.asarray(Image.open(archive.extractfile(member)))
                    break
            assert np.abs(beton.image(index).astype(int) - expected).max() <= 4  # libjpeg's own builds differ
    assert manifest["classes"][beton.labels[per_class * 3]] == "cat"
