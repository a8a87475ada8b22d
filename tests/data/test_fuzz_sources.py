"""Mutated files of every source end in clear errors alone; axes of arrays; one place for what readers raise."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from fastssl.data.sources import open_source
from fastssl.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_sources.py"


def test_mutated_files_of_every_source_raise_only_user_errors(tmp_path, capfd):
    spec = importlib.util.spec_from_file_location("fuzz_sources", TOOL)
    fuzz_sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_sources)
    outcomes = fuzz_sources.fuzz(tmp_path, random.Random(7), rounds=12)
    assert len(outcomes) >= 16
    total = sum(outcomes.values(), start=fuzz_sources.Counter())
    assert set(total) <= {"read", "refused"}
    assert min(total["read"], total["refused"]) > 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("field.csv", b"path,label\n" + b"a" * 200_000),
        ("breaks.csv", "p\x85ath,la\x1cbel\u2028\na,b\n".encode()),
        ("token.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n"),
        ("escape.npy", b"\x93NUMPY\x01\x00\x10\x00{'\\d': '\\q'    }\n"),
        ("broken.npz", b"PK\3\4 not a zip"),
        ("broken.zip", b"PK\5\6" + b"\xff" * 18),
        ("broken.parquet", b"PAR1" + b"\xff" * 20 + b"PAR1"),
    ],
)
def test_readers_errors_are_two_lines_with_the_files_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        open_source(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 2
    assert " at 0x" not in str(caught.value)


def test_an_array_of_objects_is_refused_and_never_unpickled(tmp_path):
    labels = np.array(["a", None], object)
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
    with pytest.raises(UserError, match=r"x\.npz cannot be read: Object arrays cannot be loaded"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((2, 3, 32, 32), (32, 32, 3)),
        ((2, 32, 32, 3), (32, 32, 3)),
        ((2, 4, 20, 30), (20, 30, 4)),
        ((2, 12, 64, 64), (64, 64, 12)),
        ((2, 64, 64, 12), (64, 64, 12)),
        ((2, 28, 28, 30), (28, 28, 30)),
        ((2, 13, 20, 31), (20, 31, 13)),
        ((2, 20, 31, 13), (20, 31, 13)),
        ((2, 20, 31), (20, 31, 1)),
    ],
)
def test_arrays_have_their_channels_first_or_last(tmp_path, shape, image):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "x.npy", values)
    found = open_source(tmp_path / "x.npy").read(1).data
    assert found.shape == image
    first = values[1][None] if len(shape) == 3 else values[1]
    np.testing.assert_array_equal(found, values[1] if shape[1:] == image else first.transpose(1, 2, 0))


def test_an_array_whose_channels_nobody_can_tell_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 12, 20, 12), np.uint8))
    with pytest.raises(UserError, match="either end may be the channels"):
        open_source(tmp_path / "x.npy")
