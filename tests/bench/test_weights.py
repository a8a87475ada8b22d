"""The search for the best orthogonality weight: its peak, its slope, and one tiny sweep."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import one_torch_thread

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import weights


@pytest.mark.parametrize("best", [0.02, 0.013, 0.08])
def test_the_peak_of_a_parabola_in_log_weight_is_found(best):
    tried = [0.001, 0.004, 0.016, 0.064, 0.256]
    values = [70 - 3 * weights.np.log(w / best) ** 2 for w in tried]
    assert weights.peak(tried, values) == pytest.approx(best)
    assert weights.peak(tried, sorted(values)) == 0.256  # it may lie beyond


def test_a_weight_of_c_over_d_has_slope_minus_one():
    found = {}
    for dim in (64, 256, 1024):
        for factor in (0.25, 1, 4):
            found[dim, 5 * factor / dim] = [70 - weights.np.log(factor) ** 2] * 2
    best = weights.best_of(found)
    assert best[256] == pytest.approx([5 / 256] * 2)
    assert weights.slopes(best) == pytest.approx([-1, -1])


def test_the_command_runs_once_and_writes_its_record(tiny_recipe, tmp_path, capsys):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    words = [str(path), "--dims", "8", "16", "--factors", "0.5", "1", "2", "--seeds", "1", "--out", str(tmp_path / "r")]
    words += ["--json", str(tmp_path / "w.json"), "--figure", str(tmp_path / "w.png")]
    with one_torch_thread():
        weights.main(words)
        made = json.loads((tmp_path / "w.json").read_text())
        times = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("summary.json")}
        weights.main(words)
    assert len(times) == 6
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert [r["work"]["of_rule"] for r in made["rows"][:3]] == pytest.approx([0.5, 1, 2])
    assert {r["metric"] for r in made["rows"]} == {"val_ridge_pct", "best_weight", "c", "slope"}
    assert (tmp_path / "w.png").stat().st_size > 1000
    assert "D = 16: best weight" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--dims", "0"], ["--seeds", "0"], ["--seeds", "x"]])
def test_a_number_that_is_none_is_refused_before_anything_is_written(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        weights.main(["quickstart", *words, "--json", str(tmp_path / "w.json")])
    assert stop.value.code == 2
    assert f"{words[1]} is not a whole number from 1 on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
