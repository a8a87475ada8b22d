"""The GPU suite without a GPU: the dry run ends, a budget is kept, a signal and a bare machine lose nothing."""

import itertools
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fastssl.cli.app import app
from fastssl.errors import UserError
from fastssl.training.guards import EXIT_CODE, Interrupts

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import augment
import claims
import epoch
import gpu_results
import gpu_suite
import record
import tta_peers
from gpu_stages import Setting, Stage, stages
from gpu_summary import page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(source="cifar10", out=tmp_path / "out", dry=True)


def stage(name: str, code: str, **more: Any) -> Stage:
    limits = {"least_min": 0.0, "most_min": 1.0} | more
    return Stage(name, name, lambda setting, out: ["-c", code, str(out)], **limits)


WRITES = "import json, sys; from pathlib import Path; Path(sys.argv[1]).write_text(json.dumps({'rows': []}))"


def run(setting: Setting, *, budget_s: float = 600.0, only: Sequence[str] = ()) -> list[gpu_suite.Outcome]:
    results = setting.out.with_name("results.tar.gz")
    return gpu_suite.Suite(setting, results, budget_s=budget_s, only=only, interrupts=Interrupts()).run()


def states(outcomes: list[gpu_suite.Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


# a script, two stages that share a file, and the command with runs of its own; all others cost two minutes of CPU
DRY_STAGES = ("smoke", "photographs", "step-resnet50-224", "tta")


def test_the_dry_run_goes_through_its_stages(setting: Setting, capsys: pytest.CaptureFixture[str]):
    code = gpu_suite.main(["--dry", "--out", str(setting.out), "--budget-min", "45", "--only", *DRY_STAGES])
    assert code == 0, capsys.readouterr()
    names = [stage.name for stage in stages(setting) if stage.name in DRY_STAGES]
    suite = json.loads((setting.out / "suite.json").read_text())
    assert [(stage["name"], stage["state"]) for stage in suite["stages"]] == [(name, "done") for name in names]
    records = {name: json.loads((setting.out / f"{name}.json").read_text()) for name in names}
    assert all(record["rows"] for record in records.values())
    assert records["smoke"]["checks"]
    html = (setting.out / "index.html").read_text()
    assert "dry run" in html
    assert all(f"<h2>{name}</h2>" in html for name in names)
    with tarfile.open(setting.out.with_name("out.tar.gz")) as archive:
        assert {f"{name}.json" for name in names} <= set(archive.getnames())


def test_finished_stages_are_kept_and_failed_ones_run_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark = tmp_path / "mark"
    chosen = [
        stage("good", f"open({str(mark)!r}, 'a').write('x'); {WRITES}"),
        stage("bad", f"open({str(mark)!r}, 'a').write('y'); print('it broke'); raise SystemExit(1)"),
        stage("absent", "", needs=("no_such_package",)),
    ]
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: chosen)
    first = run(setting)
    assert states(first) == ["done", "failed", "left out"]
    assert first[1].reason == "it broke"
    assert "no_such_package" in first[2].reason
    assert states(run(setting)) == ["done", "failed", "left out"]
    assert mark.read_text() == "xyy"


def test_another_machine_continues_from_the_archive_of_results(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write('x'); open('weights.safetensors', 'wb').write(bytes(99)); {WRITES}"
    images = (
        f"open({str(mark)!r}, 'a').write('d'); import os; os.makedirs('data'); open('data/images.json', 'w'); {WRITES}"
    )
    data = stage("data", images, makes="data/images.json")
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("first", code), data, stage("second", code)])
    assert states(run(setting, only=["first", "data"])) == ["done", "done"]
    setting.out.rename(tmp_path / "the machine is gone")
    assert states(run(setting)) == ["done", "done", "done"]
    assert mark.read_text() == "xddx"
    assert states(run(setting)) == ["done", "done", "done"]
    assert mark.read_text() == "xddx"
    assert (setting.out / "first.json").exists()
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert not [name for name in archive.getnames() if name.endswith(".safetensors") or name.startswith("data/")]


def test_results_of_another_commit_are_measured_again(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("stage", WRITES)])
    run(setting)
    suite = json.loads((setting.out / "suite.json").read_text())
    suite["commit"] = "0" * 40
    suite["stages"][0]["title"] = "of another commit"
    (setting.out / "suite.json").write_text(json.dumps(suite))
    assert [outcome.title for outcome in run(setting)] == ["stage"]


def test_a_budget_takes_the_first_stages_that_fit(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.0)
    chosen = [stage("telling", WRITES), stage("long", WRITES, least_min=10.0), stage("short", WRITES)]
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: chosen)
    outcomes = run(setting, budget_s=300)
    assert states(outcomes) == ["done", "left out", "done"]
    assert "repeat" in outcomes[1].reason
    assert states(run(setting, budget_s=0)) == ["done", "left out", "done"]


def test_the_order_is_from_the_most_telling_on(setting: Setting):
    names = [stage.name for stage in stages(Setting(source="cifar10", out=setting.out, dry=False))]
    wanted = ["smoke", "machine", "step-resnet18", "step-resnet50", "augment-32"]
    wanted += ["step-resnet50-224", "step-vit_small-224", "tta", "peers", "loader", "claims"]
    assert [name for name in names if name in wanted] == wanted


def test_a_stage_that_hangs_is_stopped_with_its_children(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script, late = tmp_path / "late.py", tmp_path / "late"
    script.write_text(f"import time; time.sleep(6); open({str(late)!r}, 'w')")
    code = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, {str(script)!r}])\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("hangs", code)])
    assert states(run(setting, budget_s=3)) == ["stopped"]
    time.sleep(6)
    assert not late.exists()


DRIVER = """
import sys
sys.path[:0] = [{bench!r}, {root!r}]
import gpu_suite
from gpu_stages import Stage
code = "import time, pathlib; pathlib.Path('started').touch(); time.sleep(600)"
done = "import json, sys; open(sys.argv[1], 'w').write(json.dumps(dict(rows=[])))"
words = lambda code: lambda setting, out: ["-c", code, str(out)]
chosen = dict(first=done, second=code, third=done)
gpu_suite.stages = lambda setting: [Stage(name, name, words(code), 0, 9) for name, code in chosen.items()]
sys.exit(gpu_suite.main(["--dry", "--out", {out!r}]))
"""


def test_sigterm_saves_what_is_there_and_says_how_to_continue(setting: Setting):
    script = DRIVER.format(bench=str(ROOT / "bench"), root=str(ROOT), out=str(setting.out))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    wait_for(setting.out / "started")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE
    suite = json.loads((setting.out / "suite.json").read_text())
    assert [stage["state"] for stage in suite["stages"]] == ["done", "stopped", "left out"]
    assert "SIGTERM" in suite["stages"][1]["reason"]
    assert "repeat" in output
    with tarfile.open(setting.out.with_name("out.tar.gz")) as archive:
        assert {"suite.json", "index.html", "first.json", "second.log"} <= set(archive.getnames())


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} was never written"
        time.sleep(0.05)


def test_stages_see_the_callers_pythonpath(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "only_there.py").write_text("ANSWER = 42")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    code = "import only_there, fastssl; assert fastssl.__file__.startswith({!r}); {}"
    monkeypatch.setattr(gpu_suite, "stages", lambda setting: [stage("stage", code.format(str(ROOT), WRITES))])
    assert states(run(setting)) == ["done"]


def test_warnings_fail_no_test_of_the_suite(tmp_path: Path):
    (tmp_path / "test_warns.py").write_text(
        "import subprocess, sys, warnings\n"
        "def test_here(): warnings.warn('of a version that the tests were not written for')\n"
        "def test_hopeless(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = slow: slow\n")
    command = [sys.executable, str(ROOT / "bench" / "gpu_tests.py"), str(tmp_path / "out.json"), "-q", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert {row["metric"]: row["median"] for row in record["rows"]} == {"passed": 1, "failed": 1, "skipped": 0}
    assert record["failures"] == ["test_warns.py::test_hopeless"]


def test_the_archive_of_results_refuses_paths_outside(tmp_path: Path):
    (tmp_path / "evil.json").write_text("{}")
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil.json", "../../evil.json")
    with pytest.raises(UserError, match="no file inside of it"):
        gpu_results.unpack(tmp_path / "results.tar.gz", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("a/**/*.json"))
    (tmp_path / "results.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        gpu_results.unpack(tmp_path / "results.tar.gz", tmp_path / "a" / "b")


def test_an_epoch_with_one_change_at_a_time_is_kept_when_it_is_done(
    tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    recipe, table, out = tmp_path / "tiny.yaml", tmp_path / "table.yaml", tmp_path / "epoch.json"
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    table.write_text("short: [train.epochs=1]\nlevers: {as it is: [], larger batch: [data.batch_size=64]}\n")
    words = [str(out), str(recipe), "--levers", str(table), "--runs", str(tmp_path / "runs")]
    epoch.main(words)
    made = json.loads(out.read_text())
    rows = {(one["impl"], one["metric"]): one for one in made["rows"]}
    assert {impl for impl, _ in rows} == {"as it is", "larger batch"}
    assert rows["as it is", "knn20_pct"]["n"] == 1
    assert rows["as it is", "ms_per_step"]["n"] == 4  # between five steps of 32 of 160 images
    assert rows["larger batch", "ridge_pct"]["work"] == {"views": 256, "precision": "fp32"}
    assert made["levers"] == {"as it is": [], "larger batch": ["data.batch_size=64"]}

    table.write_text(table.read_text().replace("{", "{too late: [seed=1], "))
    monkeypatch.setattr(record.fastssl, "train", lambda *_, **__: pytest.fail("finished runs are kept"))
    epoch.main([*words, "--limit-min", "-1"])
    assert json.loads(out.read_text())["rows"] == made["rows"]

    table.write_text(table.read_text().replace("size=64", "size=80"))
    with pytest.raises(UserError, match="another recipe"):
        epoch.main([*words, "--limit-min", "-1"])
    table.write_text("as it is: []\n")
    with pytest.raises(UserError, match="not a table of levers"):
        epoch.main(words)
    with pytest.raises(UserError, match="does not measure"):
        epoch.main([str(out), str(recipe), "-s", "data.val_count=0"])


def test_the_commands_for_a_gpu_name_files_and_recipes_that_exist(tmp_path: Path):
    from fastssl.recipe.load import load

    real = Setting(source="cifar10", out=tmp_path, dry=False)
    for stage in stages(real):
        words = stage.words(real, tmp_path / "out.json")
        assert str(tmp_path / "out.json") in words
        scripts = [word for word in words if word.endswith((".py", ".yaml"))]
        assert all(Path(script).exists() for script in scripts)
        assert stage.name != "gpu-tests" or len(scripts) > 4
        changes = [after for before, after in itertools.pairwise(words) if before == "-s"]
        for recipe in [word for word in words if word.startswith("cifar10_") or word.endswith(".yaml")]:
            load(recipe, changes)


@pytest.mark.parametrize("dry", [False, True])
def test_every_stages_words_are_options_of_its_command(dry: bool, tmp_path: Path):
    setting = Setting(source="cifar10", out=tmp_path, dry=dry)
    parsers = {"augment.py": augment.parse, "claims.py": claims.parse, "tta_peers.py": tta_peers.parse}
    checked = 0
    for stage in stages(setting):
        words = stage.words(setting, tmp_path / "out.json")
        if words[:2] == ["-m", "fastssl"]:
            command = typer.main.get_command(app).commands[words[2]].commands[words[3]]  # type: ignore[attr-defined]
            assert command.make_context(command.name, words[4:]).params
            checked += 1
        elif Path(words[0]).name in parsers:
            assert parsers[Path(words[0]).name](words[1:])
            checked += 1
    assert checked >= 6


def test_a_stage_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu_suite.main(["--dry", "--out", str(tmp_path / "out"), "--only", "smoke", "smok"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "smok" in lines[0]
    assert "machine" in lines[1]
    assert not (tmp_path / "out").exists()


def test_the_page_escapes_what_it_shows():
    suite = {"hardware": {"gpus": [], "cpu": "<cpu>"}, "versions": {}, "commit": None, "date": "today", "dry": False}
    row = {"impl": "<b>", "work": {"x": 1}, "metric": "ms", "median": None, "min": None, "max": None, "n": 0}
    html = page(suite | {"stages": []}, {"step": {"rows": [row]}})
    assert "<cpu>" not in html
    assert "&lt;b&gt;" in html
    assert "not reached" in html
