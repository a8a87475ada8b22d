"""The manifest survives JSON, and nothing absurd becomes one."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data.convert.convert import convert
from fastssl.data.manifest import Manifest, read_manifest

RECORD: dict[str, Any] = {
    "count": 3,
    "channels": 3,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "digest": "sha256:0",
    "classes": ["a", "b"],
    "side_px": 32,
}


def test_what_convert_writes_is_what_it_returns(tmp_path):
    for name, options in (("a.beton", {}), ("shards", {"format": "webdataset"})):
        manifest = convert("shapes", tmp_path / name, count=12, **options)
        assert read_manifest(tmp_path / name) == manifest
        assert json.loads((tmp_path / f"{name}.json").read_text()) == manifest.to_json()


def test_images_larger_than_any_view_are_data_too():
    assert Manifest.from_json(RECORD | {"side_px": 2000}).side_px == 2000


ABSURD = [
    *({key: value} for key in ("count", "channels", "side_px") for value in (-1, 1.5, "3", True, 10**12)),
    *({key: value} for key in ("mean", "std") for value in ([0.1], [0.1, 0.2, float("nan")], ["a", 0, 0], None, 3)),
    *({"classes": value} for value in ([1], None, 3)),
    *({"digest": value} for value in (None, 3, ["a"])),
    *({"size_max_px": value} for value in ([1], [1, 2, 3], [0, 4], "32", 7)),
    *({"skipped": value} for value in ([{}], [3], 3, [{"key": "a"}])),
    {"options": []},
]


@pytest.mark.parametrize("change", [c for c in ABSURD if c != {"count": 10**12}], ids=str)
def test_absurd_values_are_refused_in_a_sentence(change):
    with pytest.raises(ValueError, match=r".{10,}"):
        Manifest.from_json(RECORD | change)


@pytest.mark.parametrize("key", [key for key in RECORD if key not in ("classes", "side_px")])
def test_a_missing_value_is_refused(key):
    with pytest.raises(ValueError, match=key):
        Manifest.from_json({k: v for k, v in RECORD.items() if k != key})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*RECORD, "options", "skipped", "size_min_px", "shards"]), JSON) | JSON)
def test_any_json_is_a_manifest_or_a_sentence(changes):
    record = RECORD | changes if isinstance(changes, dict) else changes
    try:
        manifest = Manifest.from_json(record)
    except ValueError:
        return
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
