"""The report of a run that trains: it grows with the run, reloads itself, and ends with it."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastssl.errors import UserError
from fastssl.report import live, pictures
from fastssl.runs.directory import lock

pytest.importorskip("matplotlib")
RELOAD = re.compile(r'<meta http-equiv="refresh" content="([^"]+)">')


class Training:
    """A run's folder while it grows: epoch after epoch each time the report sleeps, then its summary and no lock."""

    def __init__(self, finished: Path, folder: Path) -> None:
        self.folder, self.finished, self.page = folder, finished, folder.parent / "out" / "index.html"
        lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
        evaluated = [i + 1 for i, line in enumerate(lines) if json.loads(line)["event"] == "evaluation"]
        cuts = [1, evaluated[0], len(lines)]
        self.parts = ["".join(lines[a:b]) for a, b in zip([0, *cuts], cuts, strict=False)]
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("summary.json", "metrics.jsonl", "checkpoints"))
        self.held = contextlib.ExitStack()
        self.held.enter_context(lock(folder, on_warning=pytest.fail))
        self.pages: list[str] = []
        self.grow()

    def grow(self, seconds: float = 0.0) -> None:
        if self.page.exists():
            self.pages.append(self.page.read_text())
        if self.parts:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(self.parts.pop(0))
        else:
            shutil.copytree(self.finished / "checkpoints", self.folder / "checkpoints", dirs_exist_ok=True)
            shutil.copy(self.finished / "summary.json", self.folder)
            self.held.close()


@pytest.fixture
def training(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    grows = Training(finished_run, tmp_path / "grows")
    monkeypatch.setattr(live, "sleep", grows.grow)
    with grows.held:
        yield grows


def test_the_page_grows_with_the_run_and_stops_with_it(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    drawn: list[bool] = []
    section: Callable[..., live.Section] = pictures.section

    def recorded(run: live.LabeledRun, *, images: int) -> live.Section:
        drawn.append((run.folder / "checkpoints").exists())
        return section(run, images=images)

    monkeypatch.setattr(pictures, "section", recorded)
    result = live.live_report([training.folder], training.page.parent, images=30, every_s=7, on_progress=notes.append)
    assert [RELOAD.findall(page) for page in training.pages] == [["7"]] * len(training.pages)
    assert "reloads every 7 s" in training.pages[0]
    assert 'id="accuracy-epochs"' not in training.pages[0], "no evaluation yet"
    assert 'id="accuracy-epochs"' in training.pages[-1]
    assert len(set(training.pages)) == 3
    assert drawn == [False, True], "pictures are drawn once for each newest checkpoint"
    last = training.page.read_text()
    assert not RELOAD.search(last)
    assert "reloads every" not in last
    assert 'id="accuracy-test"' in last, "the summary, which was written last"
    assert result["page"] == str(training.page)
    assert result["skipped"] == []
    assert not list(training.page.parent.glob(".*")), "nothing half-written"
    assert len([text for text in notes if "is written again every 7 s" in text]) == 1


def test_a_page_whose_writer_was_stopped_no_longer_reloads(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        assert RELOAD.search(training.page.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        live.live_report([training.folder], training.page.parent, images=30)
    assert not RELOAD.search(training.page.read_text())


def test_of_a_run_that_does_not_train_it_is_written_once_and_says_so(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "sleep", pytest.fail)
    notes: list[str] = []
    run = shutil.copytree(finished_run, tmp_path / "begun", ignore=shutil.ignore_patterns("metrics*", "checkpoints"))
    result = live.live_report([run], tmp_path / "out", images=30, on_progress=notes.append)
    assert not RELOAD.search(Path(result["page"]).read_text())
    assert any("No run is training" in text for text in notes)
    with pytest.raises(UserError, match="every_s is 0"):
        live.live_report([run], tmp_path / "out", every_s=0)
