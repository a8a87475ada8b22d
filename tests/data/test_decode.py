"""Image bytes of every kind against Pillow, and hostile bytes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastssl.data import decode, resize
from fastssl.data.formats import jpeg


def picture(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 5, y * 7, x + y, 255 - x][:channels], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes, mode: str) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))


RGB = Image.fromarray(picture())


@pytest.mark.parametrize(
    "data",
    [
        encoded(RGB, "JPEG", quality=90),
        encoded(RGB, "JPEG", quality=90, progressive=True),
        encoded(RGB, "JPEG", quality=90, subsampling=0),
        encoded(RGB.convert("CMYK"), "JPEG", quality=90),
        encoded(RGB, "PNG"),
        encoded(RGB, "WEBP", lossless=True),
        encoded(RGB, "BMP"),
        encoded(RGB, "TIFF"),
        encoded(RGB, "TIFF", compression="tiff_lzw"),
        encoded(RGB, "PPM"),
        encoded(RGB.quantize(16), "PNG"),
        encoded(RGB.quantize(16), "GIF"),
    ],
    ids=[
        "jpeg",
        "progressive",
        "full-color",
        "cmyk",
        "png",
        "webp",
        "bmp",
        "tiff",
        "lzw",
        "ppm",
        "palette",
        "gif",
    ],
)
def test_color_images_equal_pillows(data):
    image = decode.decode_image(data, key="x")
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, pillow(data, "RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_turns_the_image_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif)
    np.testing.assert_array_equal(decode.decode_image(data, key="x"), pillow(data, "RGB"))
    if kind == "JPEG":
        assert jpeg.is_plain(data) == (orientation == 1)


def test_nonsense_in_exif_leaves_the_image_as_stored():
    data = encoded(RGB, "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\0\0broken!!" + data[2:]
    np.testing.assert_array_equal(decode.decode_image(broken, key="x"), pillow(data, "RGB"))


def test_gray_alpha_and_16_bit_keep_their_channels_and_range():
    gray16 = (np.arange(24 * 40, dtype=np.uint16) * 68).reshape(24, 40)
    for kind in ("PNG", "TIFF"):
        image = decode.decode_image(encoded(Image.fromarray(gray16), kind), key="x")
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, gray16[..., None])
    assert decode.decode_image(encoded(RGB.convert("L"), "JPEG"), key="x").shape == (24, 40, 1)
    assert decode.decode_image(encoded(RGB.convert("1"), "PNG"), key="x").shape == (24, 40, 1)
    rgba = picture(channels=4)
    np.testing.assert_array_equal(decode.decode_image(encoded(Image.fromarray(rgba), "PNG"), key="x"), rgba)


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((9, 9), value, np.uint8)) for value in (50, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode_image(data, key="x", channels=3), np.full((9, 9, 3), 50))


def test_channels_as_asked():
    rgb, gray = picture(), picture(channels=1)
    np.testing.assert_array_equal(decode.to_channels(gray, 3, key="x"), np.repeat(gray, 3, axis=2))
    np.testing.assert_array_equal(decode.to_channels(picture(channels=4), 3, key="x"), rgb)
    luma = decode.to_channels(rgb, 1, key="x")[..., 0]
    assert np.abs(luma.astype(int) - pillow(encoded(RGB, "PNG"), "L")).max() <= 1
    assert decode.to_channels(rgb, 3, key="x") is rgb
    with pytest.raises(ValueError, match="'x' has 5 channels; it cannot be turned into 3"):
        decode.to_channels(np.zeros((2, 2, 5), np.uint8), 3, key="x")


def test_fast_dct_stays_near_the_exact_one():
    data = encoded(RGB, "JPEG", quality=90)
    fast, exact = (jpeg.decode_rgb(data, fast_dct=fast).astype(int) for fast in (True, False))
    assert 0 < np.abs(fast - exact).max() <= 8


def test_encoding_then_decoding_a_smooth_image_stays_near_it():
    found = jpeg.decode_rgb(jpeg.encode(picture(), quality=95))
    assert np.abs(found.astype(int) - picture()).mean() < 3


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_resize_takes_the_center_square_whatever_the_type(dtype, channels):
    value = np.arange(1, channels + 1) * 10
    image = np.zeros((40, 90, channels), dtype)
    image[:, 25:65] = value  # the center square, 40 px wide
    resized = resize.resize(image, 8)
    assert (resized.shape, resized.dtype) == ((8, 8, channels), dtype)
    np.testing.assert_array_equal(resized[:, 2:-2], np.broadcast_to(value, (8, 4, channels)))


def test_resize_equals_resizing_the_whole_then_cropping():
    image = picture(40, 80)
    whole = Image.fromarray(image).resize((16, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize.resize(image, 8), np.asarray(whole)[:, 4:12])


def test_resize_averages_over_what_it_drops():
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    shrunk = resize.resize(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8), 8)
    assert np.abs(shrunk.astype(int) - 127).max() <= 8  # not antialiased it would be 0 or 255


def test_resize_at_its_own_size_changes_nothing():
    image = picture(32, 32)
    np.testing.assert_array_equal(resize.resize(image, 32), image)


def test_resize_channel_by_channel_equals_all_at_once():
    image = picture(37, 61)
    apart = np.concatenate([resize.resize(image[..., c : c + 1], 16) for c in range(3)], axis=2)
    assert np.abs(apart.astype(int) - resize.resize(image, 16)).max() <= 1


def test_shrink_bounds_the_longer_side_and_never_enlarges():
    assert resize.shrink(picture(30, 90), 45).shape == (15, 45, 3)
    assert resize.shrink(picture(300, 1), 10).shape == (10, 1, 3)
    image = picture(30, 20)
    assert resize.shrink(image, 30) is image


# --- hostile bytes --------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG whose frame header states another size."""
    data = bytearray(encoded(RGB, "JPEG"))
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", [png_header(60_000, 60_000), jpeg_header(60_000, 60_000)], ids=["png", "jpeg"])
def test_a_bomb_is_refused_by_its_header(data):
    with pytest.raises(ValueError, match=r"cannot be read as an image: .*(exceed|bomb)"):
        decode.decode_image(data, key="bomb")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"hello",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.4",
        encoded(RGB, "JPEG")[:200],
        encoded(RGB, "PNG")[:80],
        encoded(RGB, "WEBP")[:40],
        encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    ],
    ids=["empty", "jpeg-start", "text", "eps", "pdf", "cut-jpeg", "cut-png", "cut-webp", "float"],
)
def test_what_is_no_image_is_one_plain_sentence(data):
    with pytest.raises(ValueError, match=r"^'dir/naïve\\nname' cannot be read as an image: .") as found:
        decode.decode_image(data, key="dir/naïve\nname")
    assert "\n" not in str(found.value)


def test_mutated_images_decode_or_raise_valueerror():
    rng = np.random.default_rng(0)
    sound = [encoded(RGB, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")]
    outcomes = {"decoded": 0, "refused": 0}
    for i in range(1400):
        data = bytearray(sound[i % len(sound)])
        for at in rng.integers(0, len(data), 1 + i % 5):
            data[at] = rng.integers(256)
        try:
            image = decode.decode_image(bytes(data), key="x")
        except ValueError:
            outcomes["refused"] += 1
        else:
            assert image.ndim == 3
            assert image.dtype in (np.uint8, np.uint16)
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 100
