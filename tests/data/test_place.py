"""A conversion killed at any step: data lie under their own manifest or under none, and splits of one conversion."""

import json

import pytest
from test_sources import png, tree

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.decode import decode_image
from fastssl.data.sources import open_source
from tests import command

KILLED = 9
# at the n-th visible name that is given, and at the n-th manifest that is removed
KILL = """
import os
from fastssl.data.convert import convert, output
from fastssl.runs import files

os_unlink = os.unlink

def killing(function, left=[{n}]):
    def change(*args, **options):
        name = os.path.basename(args[-1])
        left[0] -= not name.startswith(".") and (function is not os_unlink or name.endswith(".json"))
        if left[0] < 0:
            os._exit(9)
        return function(*args, **options)
    return change

def place(*outputs):
    for name in ("replace", "unlink"):
        setattr(os, name, killing(getattr(os, name)))
    files.exchange = killing(files.exchange)
    return output.place(*outputs)

convert.place = place
"""


def values(path):
    """A pixel of each image."""
    if path.is_dir():
        return {int(decode_image(item.data, key="")[0, 0, 0]) for item in open_source(path).items()}
    return {int(Beton(path).image(i)[0, 0, 0]) for i in range(len(Beton(path)))}


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_a_kill_leaves_no_data_under_the_manifest_of_others(tmp_path, format):
    first, second = (
        tree(tmp_path / f"{start}", {f"{'ab'[i % 2]}{start}/{i}.png": png(start + i) for i in range(8)})
        for start in (0, 100)
    )
    out, val = tmp_path / "o.beton", tmp_path / "o.val.beton"
    states = set()
    for n in range(12):
        convert(first, out, format=format, val_count=2)
        words = ["convert", str(second), str(out), "--force", "--format", format, "--val-count", "2"]
        done = command.fastssl(*words, before=KILL.format(n=n))
        state = []
        for path in (out, val):
            (is_new,) = {value >= 100 for value in values(path)}
            record = path.with_name(path.name + ".json")
            manifest = json.loads(record.read_text()) if record.exists() else None
            if manifest is not None:
                assert manifest["options"]["source"] == str(second if is_new else first)
            state.append((is_new, manifest is not None))
        assert len({is_new for is_new, has_manifest in state if has_manifest}) <= 1
        states.add(tuple(state))
        if done.returncode != KILLED:
            break
    assert done.returncode == 0, done.stderr
    assert {((False, True),) * 2, ((False, False),) * 2, ((True, False),) * 2, ((True, True),) * 2} <= states
    assert not values(out) & values(val)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".o")]
