"""One preparation of images: convert, embed of raw pixels and files, and the lines that every export carries."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import fastssl
from fastssl import build
from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.manifest import Manifest
from fastssl.errors import UserError
from fastssl.pretrained.embedding.embed import embed
from fastssl.pretrained.evaluation.splits import file_of
from fastssl.pretrained.export.export import export
from fastssl.pretrained.load import Pretrained
from fastssl.recipe.load import load

WIDTHS = {"square": {"side_px": 48}, "longest": {"max_side_px": 100}, "own": {}}


class Seen(torch.nn.Module):
    """A backbone whose features are its images."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.flatten(1) + self.bias


def net_of(manifest: Manifest, backbone: torch.nn.Module, **model: Any) -> Pretrained:
    recipe = load(
        {
            "device": "cpu",
            "data": {"path": "none.beton"},
            "augment": {"side_px": 32},
            "model": {"projector": [8], "backbone": "resnet_tiny", "stem": "patch2", "width": 0.25} | model,
            "train": {"epochs": 1, "precision": "fp32"},
        }
    )
    device = torch.device("cpu")
    clean = build.views.clean_view(recipe, manifest, device=device)
    return Pretrained(backbone.eval(), recipe, device, clean, None, manifest, "0", None)


@pytest.fixture
def photo() -> np.ndarray:
    """300 x 401, smooth and noisy, brighter to the right."""
    y, x = np.mgrid[0:300, 0:401]
    noise = np.random.default_rng(0).integers(0, 60, (300, 401, 3))
    return (np.stack([x / 3, y / 3, (x + y) / 5], axis=2) + noise).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", WIDTHS)
def test_convert_embed_and_the_exported_lines_give_one_image(
    kind: str, channels: int, photo: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(photo).save(tmp_path / "in" / "a.png")
    manifest = convert(tmp_path / "in", tmp_path / "x.beton", channels=channels, **WIDTHS[kind])
    net = net_of(manifest, Seen())
    stored = Beton(tmp_path / "x.beton").image(0)
    from_stored = net.embed([stored]) if kind == "square" else net.batch(stored[None])

    from_raw = net.embed([photo if channels == 3 else np.asarray(Image.fromarray(photo).convert("L"))[..., None]])
    embed(net, tmp_path / "in", tmp_path / "features.npy")
    from_file = np.load(tmp_path / "features.npy")

    names: dict[str, Any] = {"path": tmp_path / "in" / "a.png"}
    prepared = export(net_of(manifest, tiny_backbone(channels)), tmp_path / "m.safetensors", to="safetensors")
    exec("\n".join(prepared["preprocessing"]["code"]), names)
    from_lines = names["images"].reshape(1, -1)

    part = 1 / 255 / min(manifest.std)
    np.testing.assert_array_equal(from_file, from_stored)
    for other in (from_raw, from_lines):
        assert np.abs(other - from_stored).max() <= part * 1.001


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["square", "own"])
def test_the_exported_lines_read_gray_of_16_bits_as_convert_does(
    kind: str, channels: int, photo: np.ndarray, tmp_path: Path
) -> None:
    """Pillow's own conversion would cut every value above 255 to 255."""
    (tmp_path / "in").mkdir()
    gray = photo[..., 0].astype(np.uint16) * 257 + photo[..., 1]
    Image.fromarray(gray).save(tmp_path / "in" / "a.png")
    manifest = convert(tmp_path / "in", tmp_path / "x.beton", channels=channels, **WIDTHS[kind])
    stored = Beton(tmp_path / "x.beton").image(0)
    expected = net_of(manifest, Seen()).batch(stored[None])
    prepared = export(net_of(manifest, tiny_backbone(channels)), tmp_path / "m.safetensors", to="safetensors")
    assert "16-bit images: 65535 becomes 255, rounded" in prepared["preprocessing"]["steps"]
    names: dict[str, Any] = {"path": tmp_path / "in" / "a.png"}
    exec("\n".join(prepared["preprocessing"]["code"]), names)
    part = 1 / 255 / min(manifest.std)
    assert np.abs(names["images"].reshape(1, -1) - expected).max() <= part * 1.001


@pytest.mark.parametrize("width", [41, 42, 43, 45, 47])
def test_the_exported_lines_cut_the_same_square_at_every_remainder(
    width: int, photo: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(photo[:40, :width]).save(tmp_path / "in" / "a.png")
    manifest = convert(tmp_path / "in", tmp_path / "x.beton")
    prepared = export(net_of(manifest, tiny_backbone(3)), tmp_path / "m.safetensors", to="safetensors")
    names: dict[str, Any] = {"path": tmp_path / "in" / "a.png"}
    exec("\n".join(prepared["preprocessing"]["code"]), names)
    expected = net_of(manifest, Seen()).embed([photo[:40, :width]])
    np.testing.assert_allclose(names["images"].reshape(1, -1), expected, atol=1e-4)


@pytest.mark.parametrize("augment", [{"rows": [{"side_px": 64}] * 2}, {"all": {"side_px": 64}}])
def test_images_of_many_sizes_are_looked_at_in_the_size_of_the_largest_view(
    augment: dict[str, Any], photo: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.fromarray(photo[: 60 + i]).save(tmp_path / "in" / f"{i}.png")
    manifest = convert(tmp_path / "in", tmp_path / "x.beton")
    recipe = load({"data": {"path": "none.beton"}, "augment": augment, "train": {"epochs": 1}})
    assert build.views.clean_view(recipe, manifest, device=torch.device("cpu")).views[0].side_px == 64


def test_raw_pixels_of_16_bits_are_stretched_alone_and_in_an_array(photo: np.ndarray, tmp_path: Path) -> None:
    raw_NHWC = photo[None, :32, :32].astype(np.uint16) * 9
    np.save(tmp_path / "in.npy", raw_NHWC)
    manifest = convert(tmp_path / "in.npy", tmp_path / "x.beton", dtype="uint16", stretch=4095)
    net = net_of(manifest, Seen())
    embed(net, tmp_path / "in.npy", tmp_path / "features.npy")
    np.testing.assert_array_equal(net.embed(raw_NHWC), np.load(tmp_path / "features.npy"))
    np.testing.assert_array_equal(net.embed(list(raw_NHWC)), np.load(tmp_path / "features.npy"))


def test_an_export_says_what_pixels_are_divided_by(photo: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", photo[None, :32, :32].astype(np.uint16) * 9)
    net = net_of(convert(tmp_path / "in.npy", tmp_path / "x.beton", dtype="uint16"), tiny_backbone(3))
    prepared = export(net, tmp_path / "hub", to="huggingface")["preprocessing"]
    assert prepared["dtype"] == "uint16"
    assert "pixels divided by 65535, to [0, 1]" in prepared["steps"]
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert processor["rescale_factor"] == 1 / 65535


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_have_one_background(mode: str, channels: int, photo: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    image = Image.fromarray(photo)
    image.putalpha(Image.fromarray(photo[..., 1]))
    if mode == "P":
        image.convert("RGB").quantize(16).save(path, transparency=3)
    else:
        image.convert(mode).save(path)
    options: dict[str, Any] = {"side_px": 32, "channels": channels, "background": "#ff8000"}
    net = net_of(convert(tmp_path / "in", tmp_path / "x.beton", **options), tiny_backbone(channels))
    prepared = export(net, tmp_path / "m.safetensors", to="safetensors")["preprocessing"]
    names: dict[str, Any] = {"path": path}
    exec("\n".join(prepared["code"]), names)
    expected = net_of(net.manifest, Seen()).embed([path])
    assert np.abs(names["images"].reshape(1, -1) - expected).max() <= 1 / 255 / min(net.manifest.std) * 1.001
    assert prepared["steps"][0] == "transparent pixels over the color rgb(255, 128, 0)"


def test_a_stretch_is_said_in_words_and_has_no_lines(photo: np.ndarray, tmp_path: Path) -> None:
    """Pillow reads 16-bit color as 8-bit, so lines of it would not be what convert does."""
    (tmp_path / "in").mkdir()
    Image.fromarray(photo[..., 0].astype(np.uint16) * 9).save(tmp_path / "in" / "a.png")
    net = net_of(convert(tmp_path / "in", tmp_path / "x.beton", side_px=32, stretch=4095), tiny_backbone(3))
    prepared = export(net, tmp_path / "hub", to="huggingface")["preprocessing"]
    assert prepared["steps"][0] == "16-bit images: values of 0 to 4095 stretched to the whole range, larger ones cut"
    assert prepared["code"] == []
    assert "```python\n```" not in (tmp_path / "hub" / "README.md").read_text()


def tiny_backbone(channels: int) -> torch.nn.Module:
    recipe = load(
        {
            "data": {"path": "none.beton"},
            "model": {"backbone": "resnet_tiny", "stem": "patch2", "width": 0.25},
            "train": {"epochs": 1},
        }
    )
    return build.model.network(recipe, in_channels=channels, device=torch.device("cpu")).backbone


@pytest.mark.parametrize("kind", WIDTHS)
def test_paths_are_read_as_convert_reads_them(kind: str, photo: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    Image.fromarray(photo).save(path)
    net = net_of(convert(tmp_path / "in", tmp_path / "x.beton", **WIDTHS[kind]), Seen())
    (expected,) = net.embed([photo])
    for row in net.embed([str(path), path, photo, torch.from_numpy(photo)]):
        np.testing.assert_array_equal(row, expected)


def test_an_evaluation_converts_a_source_as_the_images_of_training(photo: np.ndarray, tmp_path: Path) -> None:
    """Transparent and 16-bit images, for a backbone that takes gray; a known set is converted again for another."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    opacity = np.full((*photo.shape[:2], 1), 100, np.uint8)
    Image.fromarray(np.concatenate([photo, opacity], axis=2)).save(tmp_path / "in" / "a" / "0.png")
    Image.fromarray(photo[..., 0].astype(np.uint16) * 9).save(tmp_path / "in" / "a" / "1.png")
    options: dict[str, Any] = {"side_px": 48, "channels": 1, "background": "white", "stretch": 4095}
    trained_on = convert(tmp_path / "in", tmp_path / "x.beton", **options)
    file = file_of(tmp_path / "in", "train", trained_on, tmp_path / "features")
    for i in range(2):
        np.testing.assert_array_equal(Beton(file).image(i), Beton(tmp_path / "x.beton").image(i))
    with pytest.raises(UserError) as error:
        file_of(tmp_path / "in", "train", trained_on, None)
    words = error.value.fix.split("`")[1].split()[4:]
    given = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    assert given == {key: str(value) for key, value in options.items()} | {"split": "train"}

    other = convert("shapes", tmp_path / "s.beton", count=4, side_px=8)
    times = []
    for manifest in (trained_on, other, other):
        known = file_of("shapes", "test", manifest, tmp_path / "features")
        assert Beton(known).image(0).shape == (manifest.side_px, manifest.side_px, manifest.channels)
        times.append(known.stat().st_mtime_ns)
    assert times[0] < times[1] == times[2]


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    convert("shapes", tmp_path / "x.beton", count=4, side_px=32)
    net = net_of(Manifest.from_json(json.loads((tmp_path / "x.beton.json").read_text())), Seen())
    (tmp_path / "text.jpg").write_text("no image")
    good = np.zeros((32, 32, 3), np.uint8)
    wrong: list[Any] = ["a.jpg", None, 3, good, iter([good]), [], [None], [[1, 2]], [good[..., 0]], [good / 255]]
    wrong += [good[None] / 255, torch.zeros(2, 3, 32, 32), ["absent.jpg"], [tmp_path], [tmp_path / "text.jpg"]]
    wrong += [np.zeros((2, 0, 32, 3), np.uint8), [np.zeros((32, 0, 3), np.uint8)]]
    for images in wrong:
        with pytest.raises(UserError, match=r"^images"):
            net.embed(images)
    with pytest.raises(UserError, match=r"^batch_size is 0"):
        net.embed([good], batch_size=0)
    with pytest.raises(UserError, match=r"^batch_size is None"):
        net.embed([good], batch_size=cast(int, None))


def test_a_backbone_is_one_line_on_the_screen(tiny_run: Path) -> None:
    assert repr(fastssl.load(tiny_run, device="cpu")) == "Pretrained(resnet_tiny, 16 px, step 5, on cpu)"


def test_every_format_carries_the_same_lines(photo: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(photo).save(tmp_path / "in" / "a.png")
    net = net_of(convert(tmp_path / "in", tmp_path / "x.beton", side_px=48), tiny_backbone(3))
    record = export(net, tmp_path / "m.safetensors", to="safetensors")
    lines = record["preprocessing"]["code"]
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["fastssl"])["preprocessing"]["code"] == lines
    assert json.loads((tmp_path / "m.safetensors.json").read_text())["preprocessing"]["code"] == lines
    export(net, tmp_path / "hub", to="huggingface")
    assert "\n".join(lines) in (tmp_path / "hub" / "README.md").read_text()
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert (processor["do_resize"], processor["do_center_crop"]) == (False, False)
    assert export(net, tmp_path / "m.pt2", to="torch-export")["preprocessing"]["code"] == lines
