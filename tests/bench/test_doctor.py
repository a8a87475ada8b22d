"""The doctor tries things rather than looking them up, says how to fix them, and names the slowest stage."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.bench import doctor, stages
from fastssl.data.beton.reader import Beton, BetonWriter
from fastssl.data.loaders import resident
from fastssl.errors import UserError
from fastssl.recipe.load import load

STEP = ["augment", "forward", "backward"]


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "jpegs.beton"
    doctor.write_jpegs(path)
    return path


@pytest.fixture
def no_checks(monkeypatch):
    """Only the stages: what works here has a test of its own."""
    for name in ("devices", "loaders", "formats", "image_kinds", "compilers"):
        monkeypatch.setattr(doctor, name, lambda: [])


def test_what_every_machine_can_do_works_here_and_what_does_not_says_why():
    found = {(check["kind"], check["name"]): check for check in doctor.examine()["checks"]}
    always = [("device", "cpu"), ("loader", "resident"), ("format", ".beton"), ("format", "WebDataset shards")]
    assert all(found[key]["works"] for key in always + [("image", kind) for kind in ("JPEG", "PNG", "TIFF", "GIF")])
    assert {name for kind, name in found if kind == "loader"} == {"resident", "ffcv", "dali"}
    assert any(name.startswith("cuda") for kind, name in found if kind == "device")
    for check in found.values():
        assert check["detail"]
        assert check["works"] == (not check["fix"])


def test_a_loader_that_delivers_wrong_pixels_does_not_work(monkeypatch):
    monkeypatch.setattr(resident, "_fill", lambda flat, beton, threads: flat.zero_())
    check = next(check for check in doctor.loaders() if check.name == "resident")
    assert (check.works, check.detail) == (False, "ValueError: its pixels differ from those of our decoder")


@pytest.mark.parametrize(
    ("error", "detail", "fix"),
    [
        (UserError("it is not installed", "pip install it"), "it is not installed", "pip install it"),
        (OSError("libcuda.so\nnot found"), "OSError: libcuda.so", "by hand"),
    ],
)
def test_a_failure_is_a_finding(error, detail, fix):
    def work() -> str:
        raise error

    check = doctor.attempt("loader", "x", work, "" if isinstance(error, UserError) else "by hand")
    assert check == doctor.Check("loader", "x", False, detail, fix)


@pytest.mark.usefixtures("no_checks")
def test_groups_with_statistics_of_their_own_are_timed_too(tiny_recipe):
    groups = ["model.batch_norm=per_view", "model.batch_norm_groups=8"]
    assert doctor.examine(load(tiny_recipe, groups))["stages"][-1]["name"] == STEP[-1]


@pytest.mark.usefixtures("no_checks")
def test_a_recipe_is_timed_stage_by_stage_and_the_slowest_named(tiny_recipe):
    found = doctor.examine(load(tiny_recipe))
    rates = {stage["name"]: stage["images_per_s"] for stage in found["stages"]}
    assert list(rates) == ["read", "copy", *STEP]  # raw images need no decoding
    assert [stage["name"] for stage in found["stages"] if stage["once"]] == ["read"]  # they are resident
    assert found["slowest"] == min(("copy", *STEP), key=rates.__getitem__)
    assert all(0 < stage["images"] <= 32 for stage in found["stages"])
    assert found["note"] is None
    json.dumps(found)


@pytest.mark.usefixtures("no_checks")
def test_data_that_is_not_there_yet_is_stood_in_for(tiny_recipe, tmp_path):
    tiny_recipe["data"] |= {"path": str(tmp_path / "later.beton"), "side_px": 16}
    found = doctor.examine(load(tiny_recipe))
    assert [stage["name"] for stage in found["stages"]] == STEP
    assert "later.beton is not converted yet" in found["note"]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("slow", ["decode", "copy"])
def test_a_slow_stage_is_found(jpegs, monkeypatch, slow):
    image, to = Beton.image, torch.Tensor.to

    def late(function, *arguments, **options):
        time.sleep(0.05)
        return function(*arguments, **options)

    if slow == "decode":
        monkeypatch.setattr(Beton, "image", lambda self, i: late(image, self, i))
    else:
        monkeypatch.setattr(
            torch.Tensor, "to", lambda self, *a, **k: late(to, self, *a, **k) if k.get("copy") else self
        )
    found = doctor.examine(jpegs)
    assert [stage["name"] for stage in found["stages"]] == ["read", "decode", "copy"]
    assert found["slowest"] == slow


@pytest.mark.usefixtures("no_checks")
def test_images_of_different_sizes_can_be_timed(tiny_recipe, tmp_path):
    from fastssl.data.convert.convert import convert

    rng = np.random.default_rng(0)
    with BetonWriter(tmp_path / "in.beton", mode="jpg") as writer:
        for i in range(12):
            writer.add(rng.integers(0, 256, (20 + i, 30, 3), np.uint8), i % 3)
    convert(tmp_path / "in.beton", tmp_path / "ragged.beton", mode="jpg")
    tiny_recipe["data"] = {"path": str(tmp_path / "ragged.beton"), "batch_size": 8}
    found = doctor.examine(load(tiny_recipe))
    assert [stage["name"] for stage in found["stages"]] == ["read", "decode", "copy", *STEP]


def test_data_that_is_not_sound_is_refused(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"no such thing" * 100)
    with pytest.raises(UserError, match="not a sound"):
        stages.data_stages(path, batch_size=4, threads=1, device=torch.device("cpu"), once=False)


def test_more_images_until_a_call_takes_long_enough():
    calls = []

    def run(images: int) -> list[float]:
        calls.append(images)
        return [images * 0.01, images * 0.02]

    assert stages.growing(run, 1000) == (16, [0.16, 0.32])
    assert calls == [4, 4, 16]
    assert stages.growing(run, 3)[0] == 3


def test_the_table_names_the_slowest_stage():
    from fastssl.cli.tables import doctor_text

    record = {
        "checks": [{"kind": "loader", "name": "dali", "works": False, "detail": "[gone]", "fix": "pip install it"}],
        "stages": [
            {"name": "read", "work": "bytes", "images_per_s": 12345.6, "once": True},
            {"name": "decode", "work": "JPEG", "images_per_s": 10.0, "once": False},
        ],
        "slowest": "decode",
        "note": None,
    }
    lines = [line.split() for line in doctor_text(record).splitlines()]
    assert ["loader", "dali", "no", "[gone]"] in lines
    assert ["dali:", "pip", "install", "it"] in lines
    assert ["read", "bytes", "12,346", "when", "opened"] in lines
    assert ["decode", "JPEG", "10", "slowest"] in lines


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("batch_size", [8, 40])
def test_a_stream_of_shards_is_timed_as_one_stage(tiny_recipe, tmp_path, batch_size):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fastssl.data.convert.convert import convert

    convert("shapes", tmp_path / "shards", format="webdataset", count=40, side_px=16)
    tiny_recipe["data"] = {"path": str(tmp_path / "shards"), "batch_size": batch_size}
    found = doctor.examine(load(tiny_recipe))
    assert [stage["name"] for stage in found["stages"]] == ["read", *STEP]
    assert 0 < found["stages"][0]["images"] <= 40
