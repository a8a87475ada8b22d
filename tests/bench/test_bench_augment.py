"""The augmentation benchmark: every peer makes normalized views for each sample, and a dry run records what ran."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import augment
from augment_peers import MEAN, PEERS, STD, Case

from fastssl.data.sources import shapes

B, V, S = 8, 2, 16
NEEDS = {"kornia": "kornia", "dali": "nvidia.dali"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """One image B times over, so that any difference between samples is the augmentation's."""
    path = tmp_path / "images.npy"
    np.save(path, np.repeat(shapes.images(1, 24, seed=1)[0], B, axis=0))
    return Case(path, side_px=S, views=V, blur=True, threads=1, step_views=B * V)


# FFCV and the compiled kornia take minutes to compile on a small machine
@pytest.mark.parametrize("name", ["fastssl-cpu", "fastssl-torch", "torchvision-v2-batch", "kornia", "dali"])
def test_peer_makes_normalized_views(name: str, case: Case, threads: None) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is not installed")
    count, made = next(PEERS[name].steps(case))
    views_NX = views(made)
    assert count == len(views_NX) == B * V
    assert views_NX.shape[1] == S * S * 3
    lowest, highest = -max(m / s for m, s in zip(MEAN, STD, strict=True)), 1 / min(STD)
    assert lowest - 1e-3 <= views_NX.min() < views_NX.max() <= highest
    distinct = len(np.unique(views_NX.round(4), axis=0))
    assert distinct == (V if name == "torchvision-v2-batch" else B * V)


def test_torchvision_loader_delivers_every_view_of_each_image(case: Case, threads: None) -> None:
    steps = PEERS["torchvision-v1"].steps(case)
    count, views_BVCHW = next(steps)
    steps.close()
    assert count == V
    assert views_BVCHW.shape == (1, V, 3, S, S)
    assert not torch.equal(views_BVCHW[:, 0], views_BVCHW[:, 1])


def test_rate_counts_all_views_of_a_window() -> None:
    steps = iter([(3, None)] * 1000)
    found = augment.window(steps, "cpu", 0.0)
    assert set(found) == {"views_per_s", "cpu_us_per_view"}
    assert found["views_per_s"] > 0
    assert len(list(steps)) == 999


def test_dry_run_records_what_ran_and_says_what_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr(augment, "CIFAR", tmp_path / "absent")
    out = tmp_path / "augment.json"
    peers, words = ["fastssl-cpu", "copy"], ["--quick", "--no-blur", "--sides", "16", "--threads", "1"]
    augment.main([*words, "--devices", "cpu", "--peers", *peers, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["bench"] == "augment"
    assert [one["impl"] for one in found["rows"] if one["metric"] == "views_per_s"] == peers
    for one in found["rows"]:
        assert one["n"] == 5
        assert 0 < one["min"] <= one["median"] <= one["max"]
        assert one["work"] | {"side_px": 16, "views": 2, "blur": False, "images": "shapes"} == one["work"]
    assert "fastssl-cpu" in capsys.readouterr().out


def test_a_cut_off_costs_one_case_and_resume_measures_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    measured: list[tuple[str, int]] = []

    class Cut:
        def __init__(self, *options: object) -> None:
            pass

        def measured(self, name: str, case: Case) -> dict[str, list[float]]:
            if len(measured) == 3:
                raise SystemExit  # a process that is killed saves nothing any more
            measured.append((name, case.views))
            return {"views_per_s": [1.0], "cpu_us_per_view": [1.0]}

        def close(self) -> None:
            pass

    monkeypatch.setattr(augment, "Bench", Cut)
    out = tmp_path / "out.json"
    words = ["--sides", "16", "--views", "2", "4", "--no-blur", "--devices", "cpu", "--peers", "copy", "fastssl-torch"]
    words += ["--threads", "1", "--resume", "--out", str(out)]
    with pytest.raises(SystemExit):
        augment.main(words)
    assert len(json.loads(out.read_text())["rows"]) == 2 * 3
    before, measured[:] = list(measured), []
    augment.main(words)
    assert [*before, *measured] == [(name, views) for views in (2, 4) for name in ("copy", "fastssl-torch")]
    assert len(json.loads(out.read_text())["rows"]) == 2 * 4


def test_a_missing_peer_is_said_and_left_out(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    monkeypatch.setattr(augment, "measure", absent)
    bench = augment.Bench(["copy", "kornia"], repeats=2, seconds=0.01)
    assert bench.measured("kornia", case) is None
    assert "kornia is left out: No module named 'kornia'" in capsys.readouterr().err
    assert list(bench.processes) == ["copy"]
    bench.close()


def absent(name: str, *_: object) -> None:
    raise ImportError(f"No module named {name!r}")


def views(made: object) -> np.ndarray:
    """Any peer's views as (N, X)."""
    parts = [made] if isinstance(made, torch.Tensor) else list(made)  # type: ignore[call-overload]
    arrays = [np.asarray(part.as_array() if hasattr(part, "as_array") else part) for part in parts]
    return np.concatenate([array.reshape(-1, S * S * 3) for array in arrays])
