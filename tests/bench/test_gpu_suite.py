"""The GPU suite without a GPU: every stage ends at tiny size, what is done is kept, what hangs is stopped."""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import gpu_suite
from gpu_stages import Setting, Stage, stages
from gpu_summary import page


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(source="cifar10", out=tmp_path, dry=True)


def test_the_dry_run_goes_through_every_stage(setting: Setting, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton", reason="the interpreted kernels need Triton")
    pytest.importorskip("matplotlib", reason="the claims stage draws figures")
    assert gpu_suite.main(["--dry-run", "--out", str(setting.out), "--budget-min", "30"]) == 0, capsys.readouterr().err
    names = [stage.name for stage in stages(setting)]
    suite = json.loads((setting.out / "suite.json").read_text())
    assert [(one["name"], one["state"]) for one in suite["stages"]] == [(name, "done") for name in names]
    rows = {name: json.loads((setting.out / f"{name}.json").read_text())["rows"] for name in names}
    assert all(rows.values())
    counts = {one["metric"]: one["median"] for one in rows["gpu-tests"]}
    assert counts["failed"] == 0
    assert counts["passed"] >= 20
    assert {one["impl"] for one in rows["peers"]} == {"fastssl", "plain torchvision"}
    shown = (setting.out / "index.html").read_text()
    assert "dry run" in shown
    assert all(f"<h2>{name}</h2>" in shown for name in names)


def stage(name: str, code: str, **more: Any) -> Stage:
    limits = {"least_min": 0.0, "most_min": 1.0} | more
    return Stage(name, name, lambda setting, out: ["-c", code, str(out)], **limits)


WRITES = "import json, sys; from pathlib import Path; Path(sys.argv[1]).write_text(json.dumps({'rows': []}))"


def test_what_is_done_is_kept_and_what_failed_runs_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark = tmp_path / "mark"
    chosen = [
        stage("good", f"open({str(mark)!r}, 'a').write('x'); {WRITES}"),
        stage("bad", f"open({str(mark)!r}, 'a').write('y'); print('it broke'); raise SystemExit(1)"),
        stage("absent", "", needs=("no_such_package",)),
    ]
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: chosen)
    first = gpu_suite.suite(setting, budget_s=60)
    assert [one.state for one in first] == ["done", "failed", "left out"]
    assert first[1].reason == "it broke"
    assert "no_such_package" in first[2].reason
    assert [one.state for one in gpu_suite.suite(setting, budget_s=60)] == ["done", "failed", "left out"]
    assert mark.read_text() == "xyy"


def test_a_stage_that_hangs_is_stopped_with_its_children(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script, late = tmp_path / "late.py", tmp_path / "late"
    script.write_text(f"import time; time.sleep(3); open({str(late)!r}, 'w')")
    code = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, {str(script)!r}])\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("hangs", code, most_min=1 / 60)])
    start = time.monotonic()
    assert gpu_suite.suite(setting, budget_s=60)[0].state == "stopped"
    assert time.monotonic() - start < 30
    time.sleep(3)
    assert not late.exists()


def test_a_spent_budget_leaves_stages_for_the_next_call(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("later", WRITES, least_min=1.0)])
    (found,) = gpu_suite.suite(setting, budget_s=30)
    assert found.state == "left out"
    assert "repeat" in found.reason


def test_the_commands_for_a_gpu_name_files_and_recipes_that_exist(tmp_path: Path):
    from fastssl.recipe.load import load

    real = Setting(source="cifar10", out=tmp_path, dry=False)
    for one in stages(real):
        words = one.words(real, tmp_path / "out.json")
        assert str(tmp_path / "out.json") in words
        scripts = [word for word in words if word.endswith((".py", ".yaml"))]
        assert all(Path(script).exists() for script in scripts)
        changes = [after for before, after in itertools.pairwise(words) if before == "-s"]
        for recipe in [word for word in words if word.startswith("cifar10_") or word.endswith(".yaml")]:
            load(recipe, changes)


def test_the_page_escapes_what_it_shows():
    made = {"hardware": {"gpus": [], "cpu": "<cpu>"}, "versions": {}, "commit": None, "date": "today", "dry": False}
    row = {"impl": "<b>", "work": {"x": 1}, "metric": "ms", "median": None, "min": None, "max": None, "n": 0}
    shown = page(made | {"stages": []}, {"step": {"rows": [row]}})
    assert "<cpu>" not in shown
    assert "&lt;b&gt;" in shown
    assert "not reached" in shown
