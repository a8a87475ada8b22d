"""Features on disk: the same numbers as in memory, in the source's order, with names and labels, all or nothing."""

import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
from PIL import Image

import fastssl
from fastssl.errors import UserError
from fastssl.pretrained.embedding.embed import embed


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of images of mixed sizes and kinds, as a camera's folder holds them."""
    generator, folder = np.random.default_rng(0), tmp_path / "photos"
    for i in range(12):
        place = folder / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        shape = (20 + i, 30 - i) if i % 3 == 0 else (20 + i, 30 - i, 3 if i % 3 == 1 else 4)
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(place / f"{i:02d}.png")
    return folder


def table(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def test_features_of_the_training_file_equal_those_in_memory(
    tiny_run: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    from fastssl.data.beton.reader import Beton

    seen: list[tuple[int, int | None]] = []
    record = embed(tiny_run, tiny_data[1], tmp_path / "f.npy", progress=lambda *a: seen.append(a), batch_size=7)
    beton, features_NF = Beton(tiny_data[1]), np.load(tmp_path / "f.npy")
    images = np.stack([beton.image(i) for i in range(100)])
    np.testing.assert_allclose(features_NF, fastssl.load(tiny_run).embed(images), rtol=1e-4, atol=1e-5)
    assert features_NF.dtype == np.float32
    assert (record["count"], record["features_dim"], record["labeled"]) == (100, features_NF.shape[1], 100)
    head, *rows = table(tmp_path / "f.csv")
    assert head == ["id", "label", "class"]
    assert [int(label) for _, label, _ in rows] == beton.labels.tolist()
    assert rows[3][0] == "test.beton[3]"
    assert seen[-1] == (100, 100)
    assert json.loads((tmp_path / "f.npy.json").read_text()) == record


def test_photos_pass_through_the_conversion_of_the_training_images(
    tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    """What convert would store, embedded, equals what embed makes of the photos themselves."""
    embed(tiny_run, photos, tmp_path / "direct.npy")
    fastssl.convert(photos, tmp_path / "photos.beton", side_px=16)
    embed(tiny_run, tmp_path / "photos.beton", tmp_path / "converted.npy")
    np.testing.assert_allclose(
        np.load(tmp_path / "direct.npy"), np.load(tmp_path / "converted.npy"), rtol=1e-4, atol=1e-5
    )
    rows = table(tmp_path / "direct.csv")[1:]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert {(row[0].split("/")[0], row[2]) for row in rows} == {("cat", "cat"), ("dog", "dog")}


def test_parquet_of_an_archive_holds_the_same_rows_with_classes_named_at_its_end(
    tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for path in sorted(photos.rglob("*.png"), key=lambda p: p.name):  # dog first, then cat, alternating
            archive.add(path, path.relative_to(photos))
    embed(tiny_run, photos, tmp_path / "f.npy")
    embed(tiny_run, tmp_path / "photos.tar", tmp_path / "f.parquet")
    found = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    order = np.argsort(found["id"])
    np.testing.assert_allclose(
        np.array(found["features"], np.float32)[order], np.load(tmp_path / "f.npy"), rtol=1e-4, atol=1e-5
    )
    rows = [[found["id"][i], str(found["label"][i]), found["class"][i]] for i in order]
    assert rows == table(tmp_path / "f.csv")[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f.csv", "f.npy", "f.npy.json", "f.parquet", "f.parquet.json", "photos", "photos.tar",
    ]  # fmt: skip


def test_an_unreadable_image_stops_without_a_trace_or_is_counted(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "99.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"99\.png"):
        embed(tiny_run, photos, tmp_path / "out" / "f.npy")
    assert not (tmp_path / "out").exists()
    assert embed(tiny_run, photos, tmp_path / "f.npy", on_error="skip")["skipped"] == 1
    assert np.load(tmp_path / "f.npy").shape[0] == 12


@pytest.mark.parametrize("kind", ["csv", "zip"])
def test_names_in_latin_1_lose_no_features(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source, name = tmp_path / f"x.{kind}", b"caf\xe9.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    if kind == "csv":
        image.save(tmp_path / os.fsdecode(name), "PNG")
        source.write_bytes(b"path,label\n" + name + b",p\xe2t\xe9\n")
    else:
        image.save(tmp_path / "cafe.png")
        with zipfile.ZipFile(source, "w") as archive:
            archive.write(tmp_path / "cafe.png", "cafe.png")
        source.write_bytes(source.read_bytes().replace(b"cafe.png", name))
    in_memory_1F = fastssl.load(tiny_run).embed(np.asarray(image)[None])
    for out in ("f.npy", "f.parquet"):
        assert embed(tiny_run, source, tmp_path / out)["count"] == 1
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), in_memory_1F, rtol=1e-4, atol=1e-5)
    columns = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    np.testing.assert_allclose(columns["features"], in_memory_1F, rtol=1e-4, atol=1e-5)
    words = {"csv": ("caf\\udce9.png", "p\\udce2t\\udce9"), "zip": ("cafΘ.png", "")}[kind]  # zip's old names are cp437
    assert (columns["id"], columns["class"]) == ([words[0]], [words[1]])
    stored = (tmp_path / "f.csv").read_bytes()
    assert (name if kind == "csv" else words[0].encode()) in stored


def test_files_of_others_are_not_replaced(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    lists = "".join(f"photos/{path.relative_to(photos)},{path.parent.name}\n" for path in sorted(photos.rglob("*.png")))
    for name in ("train.csv", "other.csv"):
        (tmp_path / name).write_text(lists)
    np.save(tmp_path / "x.npy", np.zeros((2, 16, 16), np.uint8))
    for source, out, named in [
        (tmp_path / "train.csv", "train.npy", r"train\.csv is the source"),
        (tmp_path / "train.csv", "other.npy", r"other\.csv exists already"),
        (tmp_path / "x.npy", "x.npy", r"x\.npy is the source"),
    ]:
        with pytest.raises(UserError, match=named):
            embed(tiny_run, source, tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "other.csv", "x.npy", "photos"}
    assert (tmp_path / "train.csv").read_text() == (tmp_path / "other.csv").read_text() == lists
    for _ in range(2):  # its own files are replaced
        embed(tiny_run, tmp_path / "train.csv", tmp_path / "features.npy")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"out": "f.txt"}, "f.txt"), ({"weights": "nowhere"}, "nowhere"), ({"source": "nothing"}, "nothing")],
)
def test_mistakes_are_named(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"weights": tiny_run, "source": "shapes", "out": "f.npy", "count": 4} | change
    with pytest.raises(UserError, match=named):
        embed(arguments.pop("weights"), arguments.pop("source"), arguments.pop("out"), **arguments)
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow_says_what_to_install(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"fastssl-vision\[parquet\]"):
        embed(tiny_run, "shapes", tmp_path / "f.parquet", count=4)


def test_the_command_ends_with_one_record(tiny_run: Path, tmp_path: Path) -> None:
    words = ["embed", str(tiny_run), "shapes", "--count", "20", "--out", str(tmp_path / "f.npy"), "--json"]
    done = command.fastssl(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["count"] == 20
    assert np.load(tmp_path / "f.npy").shape[0] == 20


def test_what_was_noticed_of_images_is_counted_and_printed(tiny_run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 200, (16, 16, 3 if i == 0 else 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    words = ["embed", str(tiny_run), str(tmp_path / "in"), "--out", str(tmp_path / "f.npy"), "--device", "cpu"]
    done = command.fastssl(*words)
    assert done.returncode == 0, done.stderr
    (warned,) = json.loads((tmp_path / "f.npy.json").read_text())["warnings"]
    assert (warned["item_count"], warned["first"]) == (2, "1.png")
    assert f"Warning: {warned['text']} (2 images, first 1.png)." in done.stderr.splitlines()
