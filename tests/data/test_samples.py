"""What the samples of an image file stand for: which is black, which is opacity, which is left out."""

import struct
import zlib

import numpy as np
import pytest
from test_pixels import noisy, tiff
from test_pixels import png as deep_png

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.decode import decode, decode_image


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "deflate"}, {"byteorder": ">"}, {"bigtiff": True}, {"rowsperstrip": 3}], ids=str
)
def test_zero_may_be_white_in_a_tiff(dtype, bands, options):
    """At 8 bits and one band Pillow inverts it by itself; the rest has to follow."""
    samples = noisy(20, 31, bands, dtype)
    options = options | ({"extrasamples": ["unassalpha"], "planarconfig": "contig"} if bands == 2 else {})
    stored = samples if bands == 2 else samples[..., 0]
    expected = samples.copy()
    for photometric in ("minisblack", "miniswhite"):
        image_HWC = decode_image(tiff(stored, photometric=photometric, **options), key="x")
        np.testing.assert_array_equal(image_HWC, expected)
        expected[..., 0] = np.iinfo(dtype).max - samples[..., 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_color_of_a_16_bit_png_is_opacity(tmp_path, channels):
    samples = np.full((4, 5, channels), 5000, np.uint16)
    samples[:2] = [700, 701, 702][:channels]
    samples[0, 0, -1] += 1  # nearly the color
    color = struct.pack(f">{channels}H", *samples[1, 0])
    chunk = struct.pack(">I", len(color)) + b"tRNS" + color
    data = deep_png(samples, 0 if channels == 1 else 2, chunks=chunk + struct.pack(">I", zlib.crc32(chunk[4:])))
    decoded = decode(data, key="x")
    is_clear_HW = np.zeros((4, 5), bool)
    is_clear_HW[:2] = True
    is_clear_HW[0, 0] = False
    np.testing.assert_array_equal(decoded.image_HWC[..., :-1], samples)
    np.testing.assert_array_equal(decoded.image_HWC[..., -1], np.where(is_clear_HW, 0, 65535))
    assert "--background" in decode(data, key="x", channels=3).warnings[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    convert(tmp_path / "in", tmp_path / "out.beton", background="white", dtype="uint16")
    expected = np.where(is_clear_HW[..., None], 65535, np.broadcast_to(samples, (4, 5, 3)))
    np.testing.assert_array_equal(Beton(tmp_path / "out.beton").image(0), expected)


@pytest.mark.parametrize("kind", ["tiff", "npy"])
@pytest.mark.parametrize(("bands", "channels"), [(2, 1), (2, 3), (4, 1), (4, 3), (3, 1), (1, 3), (4, 4)])
def test_a_channel_that_is_left_out_is_reported(tmp_path, kind, bands, channels):
    samples = noisy(6, 7, bands)
    if kind == "tiff":
        (tmp_path / "in").mkdir()
        layout = {"planarconfig": "contig"} if bands > 1 else {}
        stored = samples if bands > 1 else samples[..., 0]
        (tmp_path / "in" / "a.tif").write_bytes(tiff(stored, photometric="minisblack", **layout))
    else:
        np.save(tmp_path / "in", samples[None])
    source = tmp_path / ("in" if kind == "tiff" else "in.npy")
    warnings = convert(source, tmp_path / "out.beton", channels=channels).warnings
    lost = bands in (2, 4) and channels != bands
    text = "the last of N channels is left out; --channels N keeps it"
    assert [warned.text for warned in warnings] == [text] * lost
