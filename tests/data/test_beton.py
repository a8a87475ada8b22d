"""The `.beton` reader and writer against FFCV itself, a file FFCV wrote, and files nobody should have written."""

import contextlib
import gc
import importlib.util
import lzma
import os
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastssl.data.beton import writer
from fastssl.data.beton.format import FIELD, HEADER, NDARRAY, RGB, TABLE
from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.data.formats.jpeg import decode_rgb
from fastssl.data.formats.jpeg import encode as encode_jpeg
from fastssl.errors import UserError
from fastssl.runs.machine import cores

ROOT = Path(__file__).parents[2]
PAGE = 1 << 21


def picture(i: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth and different for each i: (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 3 + i, y * 4 + i * 2, (x + y) * 2 + i], axis=2).astype(np.uint8)


def noise(i: int, *shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(i).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write(path: Path, images: list, **options: object) -> Beton:
    with BetonWriter(path, **options) as writer:
        for i, image in enumerate(images):
            writer.add(image, i - 1)
    return Beton(path)


def tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- our own round trip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_ragged", [False, True])
def test_raw_round_trip_is_exact(tmp_path, is_ragged):
    images = [noise(i, 8 + i * is_ragged, 9 + 2 * i * is_ragged, 3) for i in range(20)]
    beton = write(tmp_path / "a.beton", images)
    assert len(beton) == 20
    assert beton.labels.tolist() == list(range(-1, 19))
    assert beton.labels.dtype == np.int64
    assert beton.sizes.tolist() == [list(image.shape[:2]) for image in images]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(beton.image(i), image)
        mode, data = beton.encoded(i)
        assert mode == "raw"
        assert bytes(data) == image.tobytes()
    if not is_ragged:
        np.testing.assert_array_equal(beton.raw_images(), np.stack(images))


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (5, "uint8"), (3, "uint16"), (13, "uint16")])
def test_other_channels_and_16_bit_round_trip_exactly(tmp_path, channels, dtype):
    images = [noise(i, 6, 7, channels, dtype=dtype) for i in range(5)]
    beton = write(tmp_path / "a.beton", images, channels=channels, dtype=dtype)
    assert (beton.channels, beton.dtype, beton.fields["image"]) == (channels, np.dtype(dtype), NDARRAY)
    np.testing.assert_array_equal(beton.raw_images(), np.stack(images))
    np.testing.assert_array_equal(beton.image(3), images[3])


def test_raw_images_over_several_pages_are_gathered_in_order(tmp_path):
    images = [noise(i, 400, 500, 3) for i in range(8)]  # three fit a page
    beton = write(tmp_path / "a.beton", images)
    np.testing.assert_array_equal(beton.raw_images(), np.stack(images))
    for index in ([2, 3, 4], [5, 5, 0, 1], [7], []):
        part = np.empty(len(index) * images[0].size, np.uint8)
        beton.read_raw(part, np.array(index, np.int64))
        np.testing.assert_array_equal(part, np.concatenate([images[i].ravel() for i in index] or [part]))


def test_jpeg_bytes_that_need_no_change_are_stored_as_they_are(tmp_path):
    data = encode_jpeg(picture(1), quality=80)
    beton = write(tmp_path / "a.beton", [data, picture(2)], mode="jpg", quality=95)
    assert bytes(beton.encoded(0)[1]) == data
    np.testing.assert_array_equal(beton.image(0), decode_rgb(data, fast_dct=True))
    assert np.abs(beton.image(1).astype(int) - picture(2)).max() < 25


def test_smart_stores_jpeg_above_the_threshold(tmp_path):
    small, large = picture(0, 10, 10), picture(1, 10, 11)
    beton = write(
        tmp_path / "a.beton",
        [small, large, encode_jpeg(small, quality=90), encode_jpeg(large, quality=90)],
        mode="smart",
        smart_bytes=300,
    )
    assert [beton.encoded(i)[0] for i in range(4)] == ["raw", "jpg", "raw", "jpg"]


def test_max_side_shrinks_pixels_and_jpegs_and_leaves_smaller_ones(tmp_path):
    images = [picture(0, 100, 50), encode_jpeg(picture(0, 100, 50), quality=95), picture(0, 20, 10)]
    beton = write(tmp_path / "a.beton", images, mode="raw", max_side=40)
    assert beton.sizes.tolist() == [[40, 20], [40, 20], [20, 10]]


def test_more_samples_than_hinted_move_the_data_up(tmp_path):
    count = (PAGE - HEADER.itemsize - 2 * FIELD.itemsize) // 24 + 1  # one record more than fits before the first page
    images = [noise(i, 2, 3, 3) for i in range(10)]
    path = tmp_path / "a.beton"
    with BetonWriter(path) as writer:
        for i in range(count):
            writer.add(images[i % 10], i)
    beton = Beton(path)
    assert len(beton) == count
    np.testing.assert_array_equal(beton.labels, np.arange(count))
    np.testing.assert_array_equal(
        beton.raw_images()[[0, 7, count - 1]], np.stack([images[0], images[7], images[(count - 1) % 10]])
    )
    assert beton.extents[1].min() == 2 * PAGE


def test_no_sample_straddles_a_page_even_when_pages_grow(tmp_path):
    images = [noise(0, 300, 400, 3), noise(1, 900, 900, 3), noise(2, 300, 400, 3), noise(3, 1500, 1300, 3)]
    images = images + images[:1] * 12
    path = tmp_path / "a.beton"
    beton = write(path, images)
    page = int(np.fromfile(path, HEADER, 1)["page"][0])
    assert page == 1 << 23
    _, first, length = (array.astype(np.int64) for array in beton.extents)
    np.testing.assert_array_equal(first // page, (first + length - 1) // page)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(beton.image(i), image)


# --- the writer's manners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing_and_an_earlier_file_untouched(tmp_path, fault):
    path = tmp_path / "a.beton"
    write(path, [picture(1)])
    earlier = path.read_bytes()
    with pytest.raises(fault), BetonWriter(path) as writer:  # noqa: PT012
        writer.add(picture(2))
        raise fault
    assert path.read_bytes() == earlier
    assert os.listdir(tmp_path) == ["a.beton"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no image to write"), BetonWriter(tmp_path / "a.beton"):
        pass
    assert os.listdir(tmp_path) == []


def test_an_unwritable_target_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        BetonWriter(tmp_path / "absent" / "a.beton")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    writer = BetonWriter(tmp_path / "a.beton")
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match="No space left"), writer:
        writer.add(picture(0))
    assert os.listdir(tmp_path) == []


def test_what_the_format_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be stored as JPEG"):
        BetonWriter(tmp_path / "a.beton", channels=4, mode="jpg")
    with BetonWriter(tmp_path / "b.beton", channels=2) as writer:
        writer.add(noise(0, 4, 5, 2))
        with pytest.raises(UserError, match="Set side_px"):
            writer.add(noise(0, 5, 5, 2))
        with pytest.raises(UserError, match="not uint8 of"):
            writer.add(noise(0, 4, 5, 3))
        with pytest.raises(UserError, match="not uint8 of"):
            writer.add(noise(0, 4, 5, 2, dtype="uint16"))
    assert len(Beton(tmp_path / "b.beton")) == 1
    with BetonWriter(tmp_path / "c.beton") as writer:
        writer.add(picture(0))
        with pytest.raises(UserError, match="has shape"):
            writer.add(np.zeros((70_000, 1, 3), np.uint8))


@contextlib.contextmanager
def peak_memory():
    """The most bytes that Python and NumPy held meanwhile, when it is over; the process's own peak only ever grows."""
    tracemalloc.start()
    peak = 0
    try:
        yield lambda: peak
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def test_writing_takes_memory_for_a_page_and_not_for_the_set(tmp_path):
    image = noise(0, 64, 64, 3)
    with BetonWriter(tmp_path / "warm.beton") as writer:
        writer.add(image)
    with peak_memory() as peak, BetonWriter(tmp_path / "a.beton") as writer:
        for i in range(20_000):  # 245 MB
            writer.add(image, i)
    assert 0 < peak() < 64 << 20


# --- interchange with FFCV ------------------------------------------------------------------------------------


def test_a_file_that_ffcv_wrote_with_extra_fields(tmp_path):
    path = tmp_path / "golden.beton"
    path.write_bytes(lzma.decompress((ROOT / "tests" / "golden" / "ffcv.beton.xz").read_bytes()))
    beton = Beton(path)
    assert len(beton) == 12
    assert beton.labels.tolist() == list(range(1000, 988, -1))
    assert list(beton.fields) == ["score", "about", "picture", "mask", "blob", "target"]
    assert beton.image_field == "picture"
    modes = [beton.encoded(i)[0] for i in range(12)]
    assert {"raw", "jpg"} == set(modes)
    for i, mode in enumerate(modes):
        y, x = np.mgrid[0 : 10 + i, 0 : 20 - i]
        expected = np.stack([x * 9 + i, y * 8 + i * 5, x + y * 3], axis=2)
        assert mode == ("jpg" if expected.size > 650 else "raw")
        difference = np.abs(beton.image(i).astype(int) - expected)
        assert difference.max() <= (0 if mode == "raw" else 60)
        assert difference.mean() <= (0 if mode == "raw" else 8)


class Pairs:
    """What FFCV's writer is given; at the top of the module because it hands it to other processes."""

    def __init__(self, images: list, first: tuple = ()) -> None:
        self.images, self.first = images, first

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        return (*self.first, self.images[i], i * 3 - 5)


def ffcv_write(path: Path, images: list, field, extra: dict | None = None, values: tuple = ()) -> Beton:
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter

    fields = {**(extra or {}), "image": field, "label": IntField()}
    DatasetWriter(str(path), fields, page_size=PAGE, num_workers=1).from_indexed_dataset(Pairs(images, values))
    return Beton(path)


def ffcv_images(path: Path, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels as FFCV's own loader gives them."""
    from ffcv.loader import Loader

    batches = [
        (images.numpy().copy(), labels.numpy().copy())
        for images, labels in Loader(str(path), batch_size=4, num_workers=cores().count, drop_last=False, **options)
    ]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    return images, labels[:, 0]


@pytest.fixture
def ffcv(monkeypatch):
    """FFCV, whose imports and writer warn about things that are not ours to fix.

    numba's finalizers of the pipelines that FFCV compiles fail now and then; they run here, not in another test.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("ffcv", reason="FFCV is not installed")
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: None)
    gc.collect()


@pytest.mark.parametrize("mode", ["raw", "jpg", "smart"])
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_ours_with_equal_pixels(tmp_path, ffcv, mode, os_cache):
    images = [picture(i, 120, 200) for i in range(70)]  # 5 MB raw: several pages
    mixed = [encode_jpeg(image, quality=85) if i % 2 else image for i, image in enumerate(images)]
    beton = write(tmp_path / "a.beton", mixed, mode=mode, smart_bytes=100)
    found, labels = ffcv_images(beton.path, os_cache=os_cache)
    assert labels.tolist() == beton.labels.tolist()
    for i in range(70):
        np.testing.assert_array_equal(found[i], beton.image(i))


def test_ffcv_reads_our_array_field(tmp_path, ffcv):
    images = [noise(i, 6, 7, 5) for i in range(9)]
    found, labels = ffcv_images(write(tmp_path / "a.beton", images, channels=5).path)
    np.testing.assert_array_equal(found, np.stack(images))
    assert labels.tolist() == list(range(-1, 8))


def test_ffcv_finds_ours_of_several_sizes_in_its_own_tables(tmp_path, ffcv):
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader

    images = [picture(i, 20 + i, 30 - i) for i in range(12)]
    beton = write(tmp_path / "a.beton", images, mode="smart", smart_bytes=1900)
    reader = Reader(str(beton.path))
    lengths = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    data = np.fromfile(beton.path, np.uint8)
    assert reader.field_names == ["image", "label"]
    for i, record in enumerate(reader.metadata["f0"]):
        stored = data[int(record["data_ptr"]) :][: lengths[int(record["data_ptr"])]]
        height, width = int(record["height"]), int(record["width"])
        if record["mode"] == 1:
            pixels = stored.reshape(height, width, 3)
        else:
            pixels = np.empty((height, width, 3), np.uint8)
            assert imdecode(stored, pixels, height, width, height, width) == 0
        np.testing.assert_array_equal(pixels, beton.image(i))


@pytest.mark.parametrize(
    "options",
    [
        {"write_mode": "raw"},
        {"write_mode": "jpg", "jpeg_quality": 75},
        {"write_mode": "smart", "smart_threshold": 2500},
        {"write_mode": "proportion", "compress_probability": 0.5},
    ],
    ids=lambda options: options["write_mode"],
)
def test_we_read_what_ffcv_writes(tmp_path, ffcv, options, capfd):
    from ffcv.fields import RGBImageField

    images = [picture(i, 24, 32) for i in range(30)]
    beton = ffcv_write(tmp_path / "a.beton", images, RGBImageField(**options))
    found, labels = ffcv_images(beton.path)
    assert labels.tolist() == beton.labels.tolist() == [i * 3 - 5 for i in range(30)]
    for i in range(30):
        np.testing.assert_array_equal(beton.image(i), found[i])
    if options["write_mode"] == "raw":
        np.testing.assert_array_equal(beton.raw_images(), np.stack(images))


def test_we_read_what_ffcv_writes_of_several_sizes_beside_other_fields(tmp_path, ffcv, capfd):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField

    extra = {
        "weight": FloatField(),
        "other": IntField(),
        "meta": JSONField(),
        "box": NDArrayField(np.dtype(np.float32), (4,)),
        "text": BytesField(),
    }
    values = (0.5, 77, {"a": [1, 2]}, np.ones(4, np.float32), np.arange(9, dtype=np.uint8))
    images = [picture(i, 24 + i, 32 - i) for i in range(10)]
    beton = ffcv_write(tmp_path / "a.beton", images, RGBImageField(write_mode="raw"), extra, values)
    assert beton.labels.tolist() == [i * 3 - 5 for i in range(10)]  # the field called label, not the first integer
    for i, image in enumerate(images):
        np.testing.assert_array_equal(beton.image(i), image)


# --- hostile files --------------------------------------------------------------------------------------------


def test_missing_empty_foreign_and_old_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Beton(tmp_path / "absent.beton")
    with pytest.raises(UserError, match="cannot be read"):
        Beton(tmp_path)
    for data in (b"", b"PK\x03\x04 a zip", b"\0" * 5000, bytes(range(256)) * 20):
        (tmp_path / "a.beton").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.beton"):
            Beton(tmp_path / "a.beton")


def changed(tmp_path: Path, offset: int, layout: str, value: int, **options: object) -> Path:
    """A sound file of five samples with one number overwritten; negative offsets count from the records' start."""
    path = tmp_path / "a.beton"
    write(path, [picture(i) for i in range(5)], **options)
    with open(path, "r+b") as file:
        file.seek(offset if offset >= 0 else HEADER.itemsize + 2 * FIELD.itemsize - offset - 1)
        file.write(struct.pack(layout, value))
    return path


RECORD = -1  # first byte of the first record: mode, width, height, offset


@pytest.mark.parametrize(
    ("offset", "layout", "value", "match"),
    [
        (0, "<H", 1, "version is 1"),
        (2, "<H", 0, "no fields"),
        (2, "<H", 65535, "list of fields would end"),
        (8, "<Q", 0, "no samples"),
        (8, "<Q", 2**63, "records of 9223372036854775808 samples would end"),
        (24, "<B", 255, r"unknown type \[255\]"),
        (24, "<B", 1, "records|no image field"),
        (RECORD, "<B", 2, "storage mode 2"),
        (RECORD - 1, "<H", 0, "no height or no width"),
        (RECORD - 1, "<H", 65535, "samples overlap|outside the file"),
        (RECORD - 5, "<Q", 3, "outside the file"),
        (RECORD - 5, "<Q", 2**64 - 1, "outside the file"),
        (RECORD - 5, "<Q", 2**64 - 2304, "outside the file"),
    ],
)
def test_a_lying_number_is_named(tmp_path, offset, layout, value, match):
    with pytest.raises(UserError, match=match):
        Beton(changed(tmp_path, offset, layout, value))


def test_a_jpeg_missing_from_the_table_or_of_another_size_is_named(tmp_path):
    with pytest.raises(UserError, match="misses a JPEG"):
        Beton(changed(tmp_path, RECORD - 5, "<Q", PAGE + 1, mode="jpg"))
    with pytest.raises(UserError, match=r"table of lengths|misses a JPEG"):
        Beton(changed(tmp_path, 16, "<Q", 2**63, mode="jpg"))
    beton = Beton(changed(tmp_path, RECORD - 1, "<H", 31, mode="jpg"))
    with pytest.raises(UserError, match="sample 0 cannot be decoded: it is 24x32, its record says 24x31"):
        beton.image(0)


def test_samples_that_share_their_bytes_are_refused(tmp_path):
    path = tmp_path / "a.beton"
    write(path, [noise(0, 900, 700, 3)] * 50)
    data = bytearray(path.read_bytes())
    start = HEADER.itemsize + 2 * FIELD.itemsize
    for i in range(50):  # a small file that claims to hold fifty large images
        struct.pack_into("<Q", data, start + i * 24 + 5, PAGE)
    path.write_bytes(data[: PAGE + 900 * 700 * 3])
    with pytest.raises(UserError, match="overlap"):
        Beton(path)


@pytest.fixture
def quick_path(tmp_path: Path):
    """A folder in memory where there is one: rewriting a file on a disk costs milliseconds."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_every_truncation_is_an_error_or_a_complete_file(quick_path):
    fuzz = tool("fuzz_beton")
    for sound in fuzz.seeds(quick_path):
        table = struct.unpack_from("<Q", sound, 16)[0]
        for length in [*range(0, 120), *range(1060, len(sound), 7)]:
            (quick_path / "cut.beton").write_bytes(sound[:length])
            outcome = fuzz.read_all(quick_path / "cut.beton")
            assert outcome == "refused" or length >= table


def test_8000_mutations_are_read_or_refused(quick_path):
    with peak_memory() as peak:
        found = tool("fuzz_beton").fuzz(8_000, 2024, quick_path)
    assert found.total() == 8_000
    assert min(found["read"], found["refused"]) > 2_000  # mutations neither all fatal nor all harmless
    assert 0 < peak() < 300 << 20


def test_records_have_the_size_that_ffcv_gives_them():
    assert (HEADER.itemsize, FIELD.itemsize, TABLE.itemsize) == (24, 1041, 24)
    assert writer.record_type([RGB, 1]).itemsize == struct.calcsize("<BHHQ3xq") == 24
