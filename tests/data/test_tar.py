"""Tar archives that are whole or not, as `tarfile`, the `tar` command and this package write them."""

import io
import shutil
import subprocess
import tarfile
import zipfile

import pytest
from test_sources import pack_tar, png, tree

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.errors import UserError


@pytest.mark.parametrize("kind", ["folder", "samples", "concatenated"])
def test_a_tar_that_is_cut_between_two_members(tmp_path, kind):
    labels = {f"{i}.cls": b"0" for i in range(20)} if kind == "samples" else {}
    files = {f"{i}.png": png(i) for i in range(20)} | labels
    whole = pack_tar(tmp_path / "cut.tar", dict(sorted(files.items()))).read_bytes()
    with tarfile.open(tmp_path / "cut.tar") as archive:
        offsets, end = [member.offset for member in archive][1:], archive.offset
    before = whole if kind == "concatenated" else b""
    for blocks in (1, 2):  # one of zeros is enough
        (tmp_path / "cut.tar").write_bytes(before + whole[:end] + bytes(512 * blocks))
        assert len(list(open_source(tmp_path / "cut.tar").items())) == (40 if before and labels else 20)
    for offset in (*offsets, end):
        (tmp_path / "cut.tar").write_bytes(before + whole[:offset])
        with pytest.raises(UserError, match=r"cut\.tar cannot be read as a tar archive: it ends without"):
            list(open_source(tmp_path / "cut.tar").items())


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
@pytest.mark.parametrize("options", ["-cf", "-czf", "--format=ustar -cf", "--format=pax -cf", "-b1 -cf"])
def test_archives_of_the_tar_command_are_whole(tmp_path, options):
    tree(tmp_path / "in", {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(20)})
    path = tmp_path / ("x.tar.gz" if "z" in options else "x.tar")
    subprocess.run(["tar", *options.split(), path, "-C", tmp_path / "in", "."], check=True)
    assert len(list(open_source(path).items())) == 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_the_last_file_of_a_name_counts(tmp_path, kind, folder):
    """As unpacking leaves it, `tar -u` and `zip` appended by a program make such."""
    names = [f"{folder}{name}" for name in ("a/0.png", "b/1.png", "a/0.png", "a/2.png", "a/0.png")]
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for value, name in enumerate(names):
                archive.writestr(name, png(value))
    else:
        with tarfile.open(path, "w") as archive:
            for value, name in enumerate(names):
                member = tarfile.TarInfo(name)
                member.size = len(png(value))
                archive.addfile(member, io.BytesIO(png(value)))
    for _ in range(2):
        manifest = convert(path, tmp_path / "out.beton")
        beton = Beton(tmp_path / "out.beton")
        found = {int(beton.image(i)[0, 0, 0]): int(label) for i, label in enumerate(beton.labels)}
        assert found == {4: 0, 1: 1, 3: 0}
        assert manifest.account["passed_over"] == {"earlier file of the same name": 2}
        assert manifest.account["splits"] == ({"train": 3} if folder else {})
