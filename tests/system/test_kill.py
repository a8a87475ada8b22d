"""A run killed three times at random moments, conversion included, ends as one that was never stopped."""

import sys
from pathlib import Path

import command
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import kill_test


def start(recipe: Path, run: Path) -> command.Command:
    """As the script starts it, without paying for `import torch` each time."""
    return command.start("train", str(recipe), "--run-dir", str(run), "--resume", env={"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_three_kills_leave_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_test, "start", start)
    seen: list[str] = []
    found = kill_test.torture(3, 5, tmp_path, seen.append)
    assert sum(found["kills"].values()) == 3
    assert found["finished"] >= 1
    assert found["differences"] == []


def test_a_difference_is_found(tmp_path: Path) -> None:
    """The comparison itself can fail: another seed ends with other weights and metrics."""
    recipe = kill_test.recipe(tmp_path)
    text = recipe.read_text().replace("epochs: 12", "epochs: 1")
    for name, seed in (("a", 0), ("b", 1)):
        recipe.write_text(f"{text}seed: {seed}\n")
        process = kill_test.start(recipe, tmp_path / name)
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert any("metrics.jsonl" in what for what in kill_test.differences(tmp_path / "b", tmp_path / "a"))
    assert len(kill_test.differences(tmp_path / "b", tmp_path / "a")) > 10


def test_the_script_says_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kill_test.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        kill_test.main()
    assert stop.value.code == 0
    assert "SIGKILL and SIGTERM" in capsys.readouterr().out
