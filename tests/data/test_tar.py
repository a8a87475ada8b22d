"""Tar archives that are whole or not, as `tarfile`, the `tar` command and this package write them."""

import shutil
import subprocess
import tarfile

import pytest
from test_sources import pack_tar, png, tree

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
        assert len(list(open_source(tmp_path / "cut.tar").items())) == 20 + 20 * bool(before)
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
