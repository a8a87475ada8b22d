"""Pixels of difficult image files, against Pillow, OpenCV and tifffile."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.decode import decode, decode_image
from fastssl.data.formats import jpeg
from fastssl.data.library_warnings import collected
from fastssl.data.sources import open_source
from fastssl.errors import UserError


def noisy(height: int = 120, width: int = 160, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))


def opencv(data: bytes) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


RGB = Image.fromarray(noisy())
JPEG = encoded(RGB, "JPEG", quality=90)
SOS = JPEG.index(b"\xff\xda")


def png(samples: np.ndarray, color: int, *, chunks: bytes = b"") -> bytes:
    """A 16-bit PNG without filters, written by hand: Pillow writes none in color."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- turned images --------------------------------------------------------------------------------------------


def behind_segments(data: bytes, count: int) -> bytes:
    """The same JPEG with `count` segments of 60,000 bytes before its first."""
    return data[:2] + (b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000)) * count + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_behind_other_segments_turns_the_image(orientation):
    data = behind_segments(encoded(RGB, "JPEG", exif=exif(orientation)), 3)
    decoded = decode(data, key="x")
    np.testing.assert_array_equal(decoded.image_HWC, pillow(data))
    assert decoded.plain == (orientation == 1)


def test_an_orientation_in_xmp_turns_the_image_as_pillow_does():
    data = encoded(RGB, "JPEG", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>')
    assert pillow(data).shape == (160, 120, 3)
    np.testing.assert_array_equal(decode_image(data, key="x"), pillow(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_no_turned_file_is_passed_through_to_shards(tmp_path, kind, orientation):
    (tmp_path / "in").mkdir()
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(RGB, kind, exif=exif(orientation), **options)
    (tmp_path / "in" / f"a.{kind.lower()}").write_bytes(data)
    convert(tmp_path / "in", tmp_path / "out", format="webdataset")
    (item,) = open_source(tmp_path / "out").items()
    stored = np.asarray(Image.open(io.BytesIO(item.data)))  # as a reader sees it that knows no EXIF
    np.testing.assert_array_equal(stored, pillow(data))
    assert (item.data == data) == (orientation == 1 and kind in ("PNG", "JPEG"))


# --- JPEG that libjpeg warns of -------------------------------------------------------------------------------


def with_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


WARNED = {
    "bad SOS": with_byte(JPEG, SOS + 12, 0),
    "before SOS": JPEG[:SOS] + b"\0\1\2\3" + JPEG[SOS:],
    "after the data": JPEG[:-2] + b"\1\2\3\4" * 5 + JPEG[-2:],
}


@pytest.mark.parametrize("name", WARNED)
def test_jpegs_that_libjpeg_warns_of_have_pillows_pixels(name):
    decoded = decode(WARNED[name], key="x")
    np.testing.assert_array_equal(decoded.image_HWC, pillow(WARNED[name]))
    assert len(decoded.warnings) == 1
    assert not decoded.plain


@pytest.mark.parametrize("name", WARNED)
def test_jpegs_that_libjpeg_warns_of_have_opencvs_pixels(name):
    np.testing.assert_array_equal(decode_image(WARNED[name], key="x"), opencv(WARNED[name])[..., ::-1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_without_its_end_marker_is_whole(mode, cut):
    data = encoded(RGB.convert(mode), "JPEG", quality=90)
    decoded = decode(data[:-cut], key="x", channels=3)
    np.testing.assert_array_equal(decoded.image_HWC, pillow(data))
    assert "end marker" in decoded.warnings[0]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_truncated_jpegs_stay_refused(options, end):
    data = encoded(RGB, "JPEG", quality=90, **options)
    for cut in (3, 4, 10, 100, len(data) // 2, len(data) - SOS - 20):
        with pytest.raises(ValueError, match="'x' cannot be read as an image"):
            decode(data[:-cut] + end, key="x")


def test_a_warned_jpeg_is_encoded_anew_for_readers_that_are_stricter(tmp_path):
    (tmp_path / "in").mkdir()
    for i, data in enumerate([JPEG, *WARNED.values(), JPEG[:-2]]):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(data)
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", mode="jpg")
    beton = Beton(tmp_path / "out.beton")
    assert [bytes(beton.encoded(i)[1]) == JPEG for i in range(5)] == [True, False, False, False, False]
    for i in range(5):
        assert np.abs(beton.image(i).astype(int) - pillow(JPEG)).mean() < 12  # noise, encoded twice
    counts = {warned.text: warned.item_count for warned in manifest.warnings}
    assert counts["Corrupt JPEG data: N extraneous bytes before marker N"] == 2
    assert sum(counts.values()) == 4


# --- JPEG of other kinds --------------------------------------------------------------------------------------


def test_only_common_jpegs_are_plain():
    assert jpeg.is_plain(JPEG)
    assert jpeg.is_plain(encoded(RGB, "JPEG", progressive=True))
    assert jpeg.is_plain(encoded(RGB.convert("L"), "JPEG"))
    assert not jpeg.is_plain(encoded(RGB.convert("CMYK"), "JPEG"))
    frame = JPEG.index(b"\xff\xc0")
    for marker in (0xC3, 0xC9, 0xCA):  # lossless, arithmetic sequential, arithmetic progressive
        assert not jpeg.is_plain(with_byte(JPEG, frame + 1, marker))
    assert not jpeg.is_plain(with_byte(JPEG, frame + 4, 12))  # bits per sample


def lossless_jpeg(gray: np.ndarray) -> bytes:
    """ITU-T T.81's lossless process, predictor 1, with a Huffman code of 8 bits for each difference's length."""
    height, width = gray.shape
    lengths = bytes([0, 0, 0, 0, 0, 0, 0, 17] + [0] * 8)
    table = b"\xff\xc4" + struct.pack(">HB", 19 + 17, 0) + lengths + bytes(range(17))
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 8, height, width, 1, 1, 0x11, 0)
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    bits = []
    for y in range(height):
        for x in range(width):
            if x:
                predicted = int(gray[y, x - 1])
            else:
                predicted = int(gray[y - 1, 0]) if y else 128
            difference = int(gray[y, x]) - predicted
            size = abs(difference).bit_length()
            bits.append(format(size, "08b"))
            if size:
                bits.append(format(difference if difference > 0 else difference + (1 << size) - 1, f"0{size}b"))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + frame + table + scan + data + b"\xff\xd9"


def test_a_lossless_jpeg_is_read_and_never_passed_through(tmp_path):
    gray = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 5
    data = lossless_jpeg(gray)
    try:
        theirs = pillow(data, "L")
    except OSError:
        pytest.skip("this Pillow reads no lossless JPEG")
    np.testing.assert_array_equal(theirs, gray)
    np.testing.assert_array_equal(decode_image(data, key="x")[..., 0], gray)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    convert(tmp_path / "in", tmp_path / "out.beton", mode="jpg")
    stored = bytes(Beton(tmp_path / "out.beton").encoded(0)[1])
    assert jpeg.is_plain(stored)
    assert stored != data


def test_gray_images_in_jpeg_modes(tmp_path):
    (tmp_path / "in").mkdir()
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    for name in ("a.jpg", "b.png"):
        Image.fromarray(smooth).save(tmp_path / "in" / name)
    convert(tmp_path / "in", tmp_path / "gray", format="webdataset", mode="jpg", channels=1)
    for item in open_source(tmp_path / "gray").items():
        image = decode_image(item.data, key="x")
        assert image.shape == (64, 64, 1)
        assert np.abs(image[..., 0].astype(int) - smooth).max() <= 6
    convert(tmp_path / "in", tmp_path / "three.beton", mode="jpg")
    assert Beton(tmp_path / "three.beton").image(0).shape == (64, 64, 3)
    with pytest.raises(UserError, match="3 channels of uint8 alone"):
        convert(tmp_path / "in", tmp_path / "one.beton", mode="jpg", channels=1)
    assert not list(tmp_path.glob("*one*"))


def test_a_color_file_is_not_passed_through_as_gray(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(JPEG)
    convert(tmp_path / "in", tmp_path / "out", format="webdataset", channels=1)
    (item,) = open_source(tmp_path / "out").items()
    assert decode_image(item.data, key="x").shape == (120, 160, 1)


# --- more than 8 bits -----------------------------------------------------------------------------------------

DEEP = noisy(24, 40, 4, np.uint16)


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (png(DEEP[..., :1], 0), DEEP[..., :1]),
        (png(DEEP[..., :3], 2), DEEP[..., :3]),
        (png(DEEP[..., :2], 4), DEEP[..., :2]),
        (png(DEEP, 6), DEEP),
        (b"P6\n# note\n40 24\n65535\n" + DEEP[..., :3].astype(">u2").tobytes(), DEEP[..., :3]),
    ],
    ids=["gray", "rgb", "gray-alpha", "rgba", "ppm"],
)
def test_16_bit_png_and_ppm_keep_every_bit(data, samples):
    image = decode_image(data, key="x")
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, samples)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_files_of_opencv_keep_every_bit(channels, suffix):
    cv2 = pytest.importorskip("cv2")
    data = cv2.imencode(suffix, DEEP[..., :channels])[1].tobytes()
    image = decode_image(data, key="x")
    expected = opencv(data).reshape(24, 40, channels)
    if channels > 1:
        image[..., :3] = image[..., 2::-1].copy()
    np.testing.assert_array_equal(image, expected)


def test_ppm_of_another_maximum_is_scaled_to_the_range():
    values = DEEP[..., :3] % 4096
    image = decode_image(b"P6 40 24 4095\n" + values.astype(">u2").tobytes(), key="x")
    np.testing.assert_array_equal(image, np.rint(values / 4095 * 65535))


def test_16_bit_color_as_uint16_and_as_uint8(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(DEEP[..., :3], 2))
    convert(tmp_path / "in", tmp_path / "16.beton", dtype="uint16")
    np.testing.assert_array_equal(Beton(tmp_path / "16.beton").image(0), DEEP[..., :3])
    convert(tmp_path / "in", tmp_path / "8.beton")
    np.testing.assert_array_equal(Beton(tmp_path / "8.beton").image(0), np.rint(DEEP[..., :3] / 257))


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow reads no JPEG 2000")
def test_bits_that_no_reader_gives_are_refused_as_uint16(tmp_path):
    (tmp_path / "in").mkdir()
    data = bytearray(encoded(RGB, "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51")
    for channel in range(3):
        data[at + 42 + 3 * channel] = 15  # 16 bits
    if not decode(bytes(data), key="x").narrowed:
        pytest.skip("this Pillow does not read the file")
    (tmp_path / "in" / "a.jp2").write_bytes(data)
    with pytest.raises(UserError, match="of which its reader gives 8; set dtype to uint8"):
        convert(tmp_path / "in", tmp_path / "out.beton", dtype="uint16")


def test_a_stretch_makes_its_value_white_and_cuts_what_is_above(tmp_path):
    values = np.array([[0, 16, 2048, 4094, 4095, 5000]], np.uint16).repeat(6, axis=0)
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / "in" / "a.png")
    expected = np.rint(np.minimum(values, 4095) / 4095 * 255)
    convert(tmp_path / "in", tmp_path / "8.beton", stretch=4095, channels=1)
    np.testing.assert_array_equal(Beton(tmp_path / "8.beton").image(0)[..., 0], expected)
    convert(tmp_path / "in", tmp_path / "16.beton", stretch=4095, channels=1, dtype="uint16")
    expected = np.rint(np.minimum(values, 4095) / 4095 * 65535)
    np.testing.assert_array_equal(Beton(tmp_path / "16.beton").image(0)[..., 0], expected)
    with pytest.raises(UserError, match="stretch is 0"):
        convert(tmp_path / "in", tmp_path / "no.beton", stretch=0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_12_bit_data_in_16_bit_files_is_reported_with_the_stretch_that_fits(tmp_path, dtype):
    (tmp_path / "in").mkdir()
    for i, top in enumerate((100, 4000)):
        Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * (top // 35)).save(tmp_path / "in" / f"{i}.png")
    (warned,) = convert(tmp_path / "in", tmp_path / "a.beton", dtype=dtype).warnings
    assert warned.text.startswith("3990 of 65535")
    assert "16 levels of 256; --stretch 4095" in warned.text
    assert warned.item_count == 2
    assert convert(tmp_path / "in", tmp_path / "b.beton", dtype=dtype, stretch=4095).warnings == ()
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(tmp_path / "in" / "2.png")
    assert convert(tmp_path / "in", tmp_path / "c.beton", dtype=dtype).warnings == ()


# --- TIFF -----------------------------------------------------------------------------------------------------


def tiff(samples: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 13, 30])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_tiff_bands_equal_tifffiles(dtype, bands, planar, photometric):
    if photometric == "rgb" and bands < 3:
        pytest.skip("no RGB")
    samples = noisy(20, 31, bands, dtype)
    stored = samples[..., 0] if bands == 1 else samples if planar == "contig" else samples.transpose(2, 0, 1)
    data = tiff(stored, photometric=photometric, planarconfig=planar if bands > 1 else None)
    decoded = decode(data, key="x", channels=bands)
    assert decoded.image_HWC.dtype == dtype
    np.testing.assert_array_equal(decoded.image_HWC, samples)


def test_bands_are_not_dropped_to_make_color():
    with pytest.raises(ValueError, match="has 8 channels; it cannot be turned into 3"):
        decode(tiff(noisy(9, 9, 8), photometric="minisblack", planarconfig="contig"), key="x", channels=3)


def test_pages_are_channels_where_their_number_says_so():
    pages = noisy(20, 30, 5).transpose(2, 0, 1)
    data = tiff(pages, photometric="minisblack")
    np.testing.assert_array_equal(decode(data, key="x", channels=5).image_HWC, pages.transpose(1, 2, 0))
    first = decode(data, key="x", channels=3)
    np.testing.assert_array_equal(first.image_HWC, np.repeat(pages[0][..., None], 3, axis=2))
    assert first.warnings == ("only the first of several frames is read",)


def test_pages_of_pillow_are_channels_too():
    pages = [Image.fromarray(page) for page in noisy(20, 30, 6).transpose(2, 0, 1)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    np.testing.assert_array_equal(decode(data, key="x", channels=6).image_HWC, noisy(20, 30, 6))


def test_without_tifffile_the_extra_is_named(monkeypatch):
    data = tiff(noisy(9, 9, 8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"its 8 bands need tifffile; .*fastssl-vision\[tiff\]"):
        decode(data, key="x", channels=8)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_samples_that_are_no_pixels_are_refused(dtype):
    with pytest.raises(ValueError, match="not 8 or 16 bit unsigned integers"):
        decode(tiff(np.zeros((4, 4), dtype)), key="x")


# --- further formats, limits, transparency --------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "feature", "suffix"), [("AVIF", "avif", "avif"), ("JPEG2000", "jpg_2000", "jp2")])
def test_avif_and_jpeg_2000_equal_pillows(tmp_path, kind, feature, suffix):
    if not features.check(feature):
        pytest.skip(f"this Pillow reads no {kind}")
    data = encoded(RGB, kind)
    np.testing.assert_array_equal(decode_image(data, key="x"), pillow(data))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{suffix}").write_bytes(data)
    convert(tmp_path / "in", tmp_path / "out.beton")
    np.testing.assert_array_equal(Beton(tmp_path / "out.beton").image(0), pillow(data))


def test_max_pixels_lets_large_photos_in_that_are_shrunk(tmp_path):
    (tmp_path / "in").mkdir()
    wide = Image.new("L", (9500, 9500), 77)
    wide.save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=r"9500x9500 pixels exceed the limit of 89478485.*max_pixels"):
        convert(tmp_path / "in", tmp_path / "out.beton", side_px=8)
    convert(tmp_path / "in", tmp_path / "out.beton", side_px=8, max_pixels=100_000_000)
    np.testing.assert_array_equal(Beton(tmp_path / "out.beton").image(0), np.full((8, 8, 3), 77))
    with pytest.raises(UserError, match="set side_px or max_side_px"):
        convert(tmp_path / "in", tmp_path / "out.beton", max_pixels=100_000_000)
    with pytest.raises(UserError, match="max_pixels is 0"):
        convert(tmp_path / "in", tmp_path / "out.beton", max_pixels=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
@pytest.mark.parametrize("color", ["white", "#204060"])
def test_a_background_shows_through_as_pillow_composes_it(tmp_path, mode, color):
    opacity = np.repeat(np.arange(160, dtype=np.uint8)[None], 120, axis=0)
    image = Image.merge("RGBA", (*RGB.split(), Image.fromarray(opacity)))
    options = {}
    if mode in ("P", "RGB", "L"):
        image = RGB.quantize(8) if mode == "P" else RGB.convert(mode)
        value = image.getpixel((0, 0))
        options["transparency"] = value
    elif mode == "PA":
        image = RGB.quantize(8).convert("PA")
        image = image.convert("RGBA")
    else:
        image = image.convert(mode)
    data = encoded(image, "PNG", **options)
    theirs = Image.open(io.BytesIO(data)).convert("RGBA")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", theirs.size, color), theirs).convert("RGB"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    convert(tmp_path / "in", tmp_path / "out.beton", background=color)
    assert np.abs(Beton(tmp_path / "out.beton").image(0).astype(int) - expected).max() <= 1


def test_transparency_without_a_background_is_reported():
    data = encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 0)), "PNG")
    decoded = decode(data, key="x", channels=3)
    np.testing.assert_array_equal(decoded.image_HWC, pillow(data))
    assert "--background" in decoded.warnings[0]
    assert decode(encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG"), key="x", channels=3).warnings == ()
    with pytest.raises(UserError, match="'reddish'"):
        convert("shapes", "x.beton", background="reddish")


# --- warnings of libraries ------------------------------------------------------------------------------------


def test_warnings_of_pillow_are_handed_over_and_not_printed(capfd, recwarn):
    cut_short = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01"
    broken = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(cut_short)) + cut_short + JPEG[2:]
    decoded = decode(broken, key="x")
    np.testing.assert_array_equal(decoded.image_HWC, pillow(JPEG))
    assert len(decoded.warnings) == 1
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_warnings_go_to_the_thread_that_reads():
    import threading
    import warnings

    seen: dict[str, list[str]] = {}
    barrier = threading.Barrier(4)

    def read(name: str) -> None:
        with collected() as texts:
            barrier.wait()
            warnings.warn_explicit(name, UserWarning, "PIL/x.py", 1, module="PIL.x")
            barrier.wait()
        seen[name] = texts

    threads = [threading.Thread(target=read, args=(str(i),)) for i in range(4)]
    show, filters = warnings.showwarning, list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {str(i): [str(i)] for i in range(4)}
    assert warnings.showwarning is show
    assert list(warnings.filters) == filters
