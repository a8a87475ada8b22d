"""Inputs made to harm or merely broken: a clear error or a counted skip, bounded memory, nothing outside the target."""

import gzip
import io
import lzma
import os
import random
import resource
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_sources import contents, pack_tar, pack_zip, png, tree

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.sources import base, open_source, tar
from fastssl.errors import UserError

GOOD = {"train/a/0.png": png(1), "train/b/1.png": png(2)}
LEAVING = ["../up.png", "/absolute.png", "train/../../up.png", "train/a/../../../up.png"]


def pack(kind, path, files):
    return pack_tar(path / "x.tar", files) if kind == "tar" else pack_zip(path / "x.zip", files)


def skipped(manifest):
    return [entry.key for entry in manifest.skipped]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_the_archive(tmp_path, kind, name):
    (tmp_path / "box" / "deep").mkdir(parents=True)
    source = pack(kind, tmp_path / "box", {**GOOD, name: png(3)})
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="leaves the archive's folder"):
        convert(source, tmp_path / "box" / "deep" / "out.beton")
    assert sorted(p for p in tmp_path.rglob("*")) == before
    manifest = convert(source, tmp_path / "box" / "deep" / "out.beton", on_error="skip")
    assert manifest.count == 2
    assert skipped(manifest) == [name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in GOOD.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = kind, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"train/a/link\.png"):
        convert(tmp_path / "x.tar", tmp_path / "out.beton")
    assert skipped(convert(tmp_path / "x.tar", tmp_path / "out.beton", on_error="skip")) == ["train/a/link.png"]


def test_links_and_encryption_in_a_zip(tmp_path):
    path = pack_zip(tmp_path / "x.zip", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("train/a/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("train/b/secret.png", png(4))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"train/b/secret.png"))
    data[at + 8] |= 1  # the flag that says: encrypted
    path.write_bytes(data)
    manifest = convert(path, tmp_path / "out.beton", on_error="skip")
    assert skipped(manifest) == ["train/a/link.png", "train/b/secret.png"]
    assert "symbolic link" in manifest.skipped[0].reason
    assert "encrypted" in manifest.skipped[1].reason


def test_a_sparse_member(tmp_path):
    header = bytearray(tarfile.TarInfo("train/a/sparse.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + pack_tar(tmp_path / "y.tar", GOOD).read_bytes())
    with pytest.raises(UserError, match="a sparse file"):
        convert(tmp_path / "x.tar", tmp_path / "out.beton")


def inflating(kind, path, size):
    """An archive of a few kilobytes whose one picture inflates to `size` zeros."""
    if kind == "zip":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("a/bomb.png", "w") as file,
        ):
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
        return path
    opener = {"gz": gzip.open, "xz": lzma.open}[kind]
    member = tarfile.TarInfo("a/bomb.png")
    member.size = size
    with opener(path, "wb") as file:
        file.write(member.tobuf())
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize(("kind", "suffix"), [("zip", "zip"), ("gz", "tar.gz"), ("xz", "tar.xz")])
def test_a_bomb_is_refused_in_little_memory(tmp_path, monkeypatch, kind, suffix):
    path = inflating(kind, tmp_path / f"x.{suffix}", 64 << 20)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr("fastssl.data.sources.archives.MAX_ITEM_BYTES", 16 << 20)
    tracemalloc.start()
    with pytest.raises(UserError, match="the limit is"):
        convert(path, tmp_path / "out.beton")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20  # xz's own dictionary is 8 MiB
    monkeypatch.setattr(tar, "_BOMB_FROM_BYTES", 1 << 20)
    if kind != "zip":
        with pytest.raises(UserError, match="inflate to more than"):
            convert(path, tmp_path / "out.beton", on_error="skip")


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    path = pack_zip(tmp_path / "x.zip", GOOD)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 1 << 27)
    path.write_bytes(data)
    tracemalloc.start()
    found, _ = contents(open_source(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [data for data, _ in found.values()] == list(GOOD.values())
    assert peak < 1 << 20


def huge_png(width, height):
    """A well-formed PNG of a few bytes that states any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def huge_jpeg(width, height):
    """A JPEG whose header states another size than its data fills."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [huge_png, huge_jpeg])
def test_a_header_of_60000_pixels_allocates_nothing(tmp_path, make):
    tree(tmp_path / "in", {**GOOD, "train/a/huge.jpg": make(60_000, 60_000), "train/a/empty.png": b""})
    tracemalloc.start()
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert skipped(manifest) == ["train/a/empty.png", "train/a/huge.jpg"]
    assert peak < 20 << 20
    with pytest.raises(UserError, match=r"empty\.png"):
        convert(tmp_path / "in", tmp_path / "out.beton")


ODD_NAMES = [
    "new\nline.png",
    "tab\t.png",
    "日本語.png",
    "עברית.png",
    "emoji🦊.png",
    "quote'\".png",
    "-rf.png",
    "a b .png",
    "%s{0}.png",
]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_names_in_any_script_and_with_newlines(tmp_path, kind):
    files = {f"{i}{name}/{name}": png(i) for i, name in enumerate(ODD_NAMES)}
    source = tree(tmp_path / "in", files) if kind == "folder" else pack(kind, tmp_path, files)
    manifest = convert(source, tmp_path / "out.beton")
    assert manifest.classes == tuple(sorted(name.partition("/")[0] for name in files))
    beton = Beton(tmp_path / "out.beton")
    found = {manifest.classes[label]: int(beton.image(i)[0, 0, 0]) for i, label in enumerate(beton.labels)}
    assert found == {name.partition("/")[0]: i for i, name in enumerate(files)}


def test_names_that_are_no_unicode_are_reported_all_the_same(tmp_path):
    folder = os.fsencode(tmp_path / "in") + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"\xff\xfe.png", b"broken\x80.png"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(png(1) if name.startswith(b"\xff") else b"broken")
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    assert (manifest.count, manifest.skipped_count) == (1, 1)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "in", tmp_path / "out.beton")
    str(caught.value).encode()  # can be printed
    assert len(str(caught.value).splitlines()) == 2


def test_errors_about_names_with_newlines_keep_to_two_lines(tmp_path):
    tree(tmp_path / "in", {"a\nb/c\n.png": b"broken"})
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "in", tmp_path / "out.beton")
    assert len(str(caught.value).splitlines()) == 2


def test_twenty_thousand_tiny_files_in_an_archive(tmp_path, monkeypatch):
    """All but one are broken; nothing is kept of those but their number and a bounded list."""
    monkeypatch.setattr("fastssl.data.convert.tally.MAX_LISTED", 100)
    header = bytearray(512)
    with open(tmp_path / "x.tar", "wb") as file:
        for i in range(20_000):
            name = b"train/%d/%d.png" % (i % 7, i)
            header = (
                name.ljust(100, b"\0") + b"0000644\x00" + 2 * b"0000000\x00" + b"%011o\0" % (3 if i else len(png(1)))
            )
            header += b"00000000000\x00" + b" " * 8 + b"0".ljust(101, b"\0") + b"ustar\x00".ljust(255, b"\0")
            file.write(header[:148] + b"%06o\0 " % sum(header) + header[156:])
            file.write((png(1) if i == 0 else b"bad").ljust(512, b"\0"))
        file.write(bytes(1024))
    manifest = convert(tmp_path / "x.tar", tmp_path / "out.beton", on_error="skip")
    assert (manifest.count, manifest.skipped_count, len(manifest.skipped)) == (1, 19_999, 100)


def test_a_folder_of_many_tiny_files(tmp_path):
    data = png(1)
    for start in range(0, 2000, 400):
        (tmp_path / "in" / str(start)).mkdir(parents=True)
        for i in range(start, start + 400):
            (tmp_path / "in" / str(start) / f"{i}.png").write_bytes(data)
    assert convert(tmp_path / "in", tmp_path / "out.beton").class_counts == (400,) * 5


def test_pipes_sockets_and_folders_named_like_pictures(tmp_path):
    tree(tmp_path / "in", GOOD)
    os.mkfifo(tmp_path / "in" / "train" / "a" / "pipe.png")
    (tmp_path / "in" / "train" / "b" / "folder.png").mkdir()
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", on_error="skip")
    assert skipped(manifest) == ["train/a/pipe.png"]


def test_files_that_vanish_or_grow_while_being_converted(tmp_path, monkeypatch):
    tree(tmp_path / "in", {f"a/{i:03d}.png": png(i % 256) for i in range(300)})

    def vanish(done, total):
        for name in ("a/298.png", "a/299.png"):
            (tmp_path / "in" / name).unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"a/298\.png"):
        convert(tmp_path / "in", tmp_path / "out.beton", progress=vanish, workers=1)
    assert not (tmp_path / "out.beton").exists()
    tree(tmp_path / "in", {f"a/{i:03d}.png": png(i % 256) for i in range(300)})
    manifest = convert(tmp_path / "in", tmp_path / "out.beton", progress=vanish, workers=1, on_error="skip")
    assert skipped(manifest) == ["a/298.png", "a/299.png"]
    monkeypatch.setattr("fastssl.data.sources.folders.MAX_ITEM_BYTES", 10)
    with pytest.raises(UserError, match="no image could be read"):
        convert(tmp_path / "in", tmp_path / "other.beton", on_error="skip")


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_a_full_target_leaves_nothing_and_keeps_the_earlier_file(tmp_path, format):
    out = tmp_path / "out"
    convert("shapes", out, count=20, format=format)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # Python ignores the signal: writes fail
    try:
        with pytest.raises(UserError, match="cannot be written"):
            convert("shapes", out, count=3000, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("format", ["beton", "webdataset"])
@pytest.mark.parametrize("target", ["/proc/fastssl/out", "/proc/out", "{file}/out"])
def test_a_target_that_cannot_be_written(tmp_path, format, target):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be (written|made)"):
        convert("shapes", target.format(file=tmp_path / "file"), count=10, format=format)


def test_a_target_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        convert("shapes", tmp_path, count=10)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "zip"])
def test_truncated_archives(tmp_path, suffix):
    rng = np.random.default_rng(0)
    files = {f"a/{i}.png": rng.bytes(2000) for i in range(20)}
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "zip":
        pack_zip(whole, files)
    else:
        pack_tar(whole, files, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[suffix])
    data = whole.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.77):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"cut|no image"):
            contents(open_source(path))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_mutated_archives_never_raise_anything_but_our_own(tmp_path, suffix):
    files = {f"train/{'ab'[i % 2]}/{i}.png": png(i) for i in range(4)} | {"train/" + "long" * 40 + ".png": png(9)}
    whole = tmp_path / f"whole.{suffix}"
    pack_zip(whole, files) if suffix == "zip" else pack_tar(whole, files, "w:gz" if suffix == "tar.gz" else "w")
    data = whole.read_bytes().rstrip(b"\0")
    data += bytes(1024 + -len(data) % 512)
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(mutated)
        try:
            source = open_source(path)
            items = list(source.items()) if hasattr(source, "items") else [source.read(i) for i in range(len(source))]
            assert all(isinstance(item, base.Item) for item in items)
        except UserError:
            refused += 1
    assert 0 < refused < 400


def test_headers_that_ask_for_the_impossible(tmp_path):
    def header(size_field, kind=b"0", name=b"a/0.png"):
        block = bytearray(512)
        block[: len(name)], block[124:136], block[156:157] = name, size_field, kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    huge = b"\x80" + (1 << 62).to_bytes(11, "big")
    for index, data in enumerate(
        [
            header(huge),
            header(b"\xff" * 12),
            header(b"not a number"),
            header(b"77777777777\0"),
            header(b"%011o\0" % (1 << 30), b"x"),
            header(b"%011o\0" % 20, b"x") + b"9999999999 path=x\n".ljust(512, b"\0") + header(b"0" * 11 + b"\0"),
            header(b"%011o\0" % 20, b"x") + b"0 path=x\n".ljust(512, b"\0") + header(b"0" * 11 + b"\0"),
            header(b"%011o\0" % 30, b"x")
            + b"30 size=999999999999999999999\n".ljust(512, b"\0")
            + header(b"0" * 11 + b"\0"),
            header(b"%011o\0" % 11, b"x") + b"11 size=-1\n".ljust(512, b"\0") + header(b"0" * 11 + b"\0"),
        ]
    ):
        path = tmp_path / f"{index}.tar"
        path.write_bytes(data + bytes(1024))
        with pytest.raises(UserError, match="tar"):
            contents(open_source(path))


def test_two_conversions_to_one_target_at_once(tmp_path):
    """The last to finish wins, whole; nothing else is left."""
    failures = []

    def run(seed):
        try:
            convert("shapes", tmp_path / "out.beton", count=500, seed=seed)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(os.listdir(tmp_path)) == ["out.beton", "out.beton.json"]
    assert len(Beton(tmp_path / "out.beton")) == 500
