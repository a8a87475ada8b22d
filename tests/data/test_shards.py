"""Shards: read alike by tarfile, by the webdataset package, by DALI with our index, and by us."""

import io
import os
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image
from test_convert import noise, photographs
from test_sources import png

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.convert.shards import ShardWriter, tar_header
from fastssl.data.decode import decode_image
from fastssl.data.sources import open_source
from fastssl.errors import UserError


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of 30 PNGs in three classes, and its shards of about 10 kB."""
    path = tmp_path_factory.mktemp("shards")
    images = noise(path / "in")
    manifest = convert(path / "in", path / "out", format="webdataset", shard_mb=0.01)
    return images, path / "out", manifest


def members(folder):
    """[(name, contents)] of all shards by tarfile, and [(shard, name, offset)]."""
    found, places = [], []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                found.append((member.name, archive.extractfile(member).read()))
                places.append((shard, member.name, member.offset_data, member.size))
    return found, places


def test_tarfile_reads_every_sample(converted):
    images, folder, manifest = converted
    found, _ = members(folder)
    assert [name for name, _ in found] == [f"{i:09d}.{s}" for i in range(30) for s in ("png", "cls")]
    for i, (name, image_HWC) in enumerate(images.items()):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found[2 * i][1]))), image_HWC)
        assert manifest.classes[int(found[2 * i + 1][1])] == name[0]
    assert manifest.format == "webdataset"
    assert manifest.shards == len(list(folder.glob("*.tar"))) > 3
    assert all(path.stat().st_size <= 10_000 for path in folder.glob("*.tar"))


def test_the_index_points_at_every_member(converted):
    _, folder, _ = converted
    _, places = members(folder)
    expected = {(shard.stem, name): (offset, size) for shard, name, offset, size in places}
    found = {}
    for index in sorted(folder.glob("*.idx")):
        head, *lines = index.read_text().splitlines()
        assert head == f"v1.2 {len(lines)}"
        for line in lines:
            words = line.split(" ")
            for suffix, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                assert name.endswith("." + suffix)
                found[index.stem, name] = (int(offset), int(size))
    assert found == expected


def test_the_webdataset_package_reads_it(converted):
    webdataset = pytest.importorskip("webdataset")
    images, folder, manifest = converted
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    for sample, (name, image_HWC) in zip(samples, images.items(), strict=True):
        np.testing.assert_array_equal(sample["png"], image_HWC)
        assert manifest.classes[sample["cls"]] == name[0]


def test_dali_reads_it_through_our_index(converted):
    dali = pytest.importorskip("nvidia.dali")
    images, folder, _ = converted
    shards = sorted(folder.glob("*.tar"))

    @dali.pipeline_def(batch_size=30, num_threads=2, device_id=None)
    def pipeline():
        encoded, label = dali.fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg;png", "cls"],
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(encoded, device="cpu"), label

    pipe = pipeline()
    pipe.build()
    decoded, labels = pipe.run()
    names = sorted({name[0] for name in images})
    for i, (name, image_HWC) in enumerate(images.items()):
        np.testing.assert_array_equal(decoded.at(i), image_HWC)
        assert int(bytes(labels.at(i))) == names.index(name[0])


def test_we_read_it_back_with_the_names_of_its_classes(converted, tmp_path):
    images, folder, manifest = converted
    source = open_source(folder)
    assert source.classes == manifest.classes
    items = list(source.items())
    assert [item.label for item in items] == ["abc".index(name[0]) for name in images]
    assert convert(folder, tmp_path / "back.beton").classes == ("a", "b", "c")
    for i, image_HWC in enumerate(images.values()):
        np.testing.assert_array_equal(Beton(tmp_path / "back.beton").image(i), image_HWC)


def test_pixels_are_kept_without_loss_or_as_jpeg_on_request(tmp_path):
    convert("shapes", tmp_path / "png", format="webdataset", count=5)
    convert("shapes", tmp_path / "jpg", format="webdataset", count=5, mode="jpg", quality=95)
    source = open_source("shapes", count=5)
    for i, (lossless, lossy) in enumerate(
        zip(members(tmp_path / "png")[0][::2], members(tmp_path / "jpg")[0][::2], strict=True)
    ):
        np.testing.assert_array_equal(decode_image(lossless[1], key="x"), source.read(i).data)
        assert lossy[0].endswith(".jpg")
        assert np.abs(decode_image(lossy[1], key="x").astype(int) - source.read(i).data).mean() < 12


def test_files_that_need_no_change_keep_their_bytes(tmp_path):
    files = photographs(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", format="webdataset")
    found, _ = members(tmp_path / "out")
    same = [data == file for (_, data), file in zip(found, files.values(), strict=True)]
    assert same == [True, False, False, True]  # the second is turned by EXIF, the third is CMYK


def test_unlabeled_samples_have_no_cls(tmp_path):
    convert("shapes", tmp_path / "out", split="unlabeled", format="webdataset", count=3)
    assert [name for name, _ in members(tmp_path / "out")[0]] == [f"{i:09d}.png" for i in range(3)]


def test_same_data_same_bytes(tmp_path):
    for name in ("a", "b"):
        convert("shapes", tmp_path / name, format="webdataset", count=20, shard_mb=0.02)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_headers_equal_tarfiles():
    for name, size in (("000000001.jpg", 0), ("x" * 100, 8**11 - 1)):
        member = tarfile.TarInfo(name)
        member.size = size
        parsed = tarfile.TarInfo.frombuf(tar_header(name, size), "ascii", "strict")
        assert (parsed.name, parsed.size, parsed.mode, parsed.mtime) == (name, size, 0o644, 0)
        assert parsed.isreg()


def test_an_older_folder_of_shards_is_replaced_and_any_other_refused(tmp_path):
    out = tmp_path / "out"
    convert("shapes", out, format="webdataset", count=30, shard_mb=0.02)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("shapes", out, format="webdataset", count=5, progress=interrupt)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert("shapes", out, format="webdataset", count=5)
    assert sorted(os.listdir(out)) == ["shard-000000.idx", "shard-000000.tar"]
    assert sorted(os.listdir(tmp_path)) == ["out", "out.json"]
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no folder of shards"):
        convert("shapes", out, format="webdataset", count=5)
    assert (out / "thesis.tex").read_text() == "precious"


def test_one_sample_larger_than_a_shard_gets_its_own(tmp_path):
    with ShardWriter(tmp_path / "out", shard_bytes=3000) as writer:
        for size in (100, 100, 9000, 100):
            writer.extend([png(1) + b"\0" * size], [0])
    assert [len(index.read_text().splitlines()) - 1 for index in sorted((tmp_path / "out").glob("*.idx"))] == [
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize("bad", [{"dtype": "uint16"}, {"channels": 4}])
def test_what_no_shard_can_hold_is_refused_at_once(tmp_path, bad):
    with pytest.raises(UserError, match="WebDataset shards hold"):
        convert("shapes", tmp_path / "out", format="webdataset", count=5, **bad)
