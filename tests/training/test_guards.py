"""What goes wrong in long runs, in real processes: bad values, no memory, full and read-only disks, hangs, signals."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command
import pytest
import torch
import yaml
from tiny import tiny

import fastssl
from fastssl.errors import UserError
from fastssl.runs import checkpoint
from fastssl.runs.directory import Records
from fastssl.training.guards import EXIT_CODE, FirstBadStep, SlowSteps
from fastssl.training.saver import Saver

HERE = Path(__file__).parent
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def recipe(tiny_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of five steps; a checkpoint every two."""
    path = tmp_path_factory.mktemp("guards") / "tiny.yaml"
    tree = tiny((tiny_data[0], None), train={"epochs": 4, "checkpoint_every_steps": 2}, evaluate={"knn_k": [5]})
    path.write_text(yaml.safe_dump(tree))
    return path


def causing(fault: str, step: int) -> str:
    return f"import sys; sys.path.append({str(HERE)!r}); import faulty_run; faulty_run.cause({fault!r}, {step})"


def train(recipe: Path, folder: Path, *words: str, fault: str = "", step: int = 0, before: str = "") -> Done:
    if fault:
        before = causing(fault, step)
    return command.fastssl("train", str(recipe), "--run-dir", str(folder), "--resume", *words, before=before)


def records(folder: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def whole(folder: Path) -> int:
    """The step of the newest checkpoint, whose weights must all be finite."""
    found = checkpoint.latest(folder / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert all(torch.isfinite(tensor).all() for tensor in found[0].values() if tensor.is_floating_point())
    return int(found[2]["step"])


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train(recipe, folder).returncode == 0
    return losses(folder)


def two_lines(done: Done) -> str:
    """The error's text; it is two lines, and exit code 2."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.rindex("Error:") :]


def test_a_loss_that_is_not_a_number_names_its_step_and_the_last_good_checkpoint(recipe: Path, tmp_path: Path) -> None:
    printed = two_lines(train(recipe, tmp_path / "run", "-s", "train.log_every_steps=100", fault="nan", step=8))
    assert "not finite at step 8: loss nan" in printed
    assert "invariance" in printed
    assert "largest weight" in printed
    assert "step-00000006" in printed
    assert whole(tmp_path / "run") == 6


def test_a_bad_step_can_be_left_out(recipe: Path, tmp_path: Path, reference: list[float]) -> None:
    done = train(recipe, tmp_path / "run", "-s", "train.on_nonfinite=skip", "--json", fault="nan", step=8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Step 8 is left out" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["skipped_steps"] == 1
    assert [r["step"] for r in records(tmp_path / "run")] == [s for s in range(1, 21) if s != 8]
    # nothing of the bad step stays: up to it all is as it was, after it all is finite and continues
    assert losses(tmp_path / "run")[:7] == reference[:7]
    assert whole(tmp_path / "run") == 20


def test_a_run_of_bad_steps_alone_ends(recipe: Path, tmp_path: Path) -> None:
    words = ["on_nonfinite=skip", "epochs=30", "checkpoint_every_epochs=30", "checkpoint_every_steps=0"]
    words = [f"train.{word}" for word in words] + ["optim.lr=1e30", "optim.name=sgd", "evaluate.every_epochs=0"]
    words = [word for setting in words for word in ("-s", setting)]
    assert "not finite" in two_lines(train(recipe, tmp_path / "run", *words))


def test_no_memory_says_what_was_asked_for_and_what_halves_it(recipe: Path, tmp_path: Path) -> None:
    printed = two_lines(train(recipe, tmp_path / "run", fault="memory", step=5))
    assert "Out of memory with data.batch_size 32 and 2 views of 16 px" in printed
    assert "268435456 bytes" in printed
    assert "optim.accumulate_steps to 2" in printed
    assert "data.batch_size to 16" in printed
    assert whole(tmp_path / "run") == 4


def test_a_step_that_hangs_ends_with_the_stack_of_every_thread(recipe: Path, tmp_path: Path) -> None:
    done = train(recipe, tmp_path / "run", "-s", "train.step_timeout_s=20", fault="hang", step=7)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "hang_in_the_loss" in done.stderr
    assert done.stderr.count("Thread 0x") >= 2
    assert whole(tmp_path / "run") == 6


def test_a_pause_is_neither_a_step_that_hangs_nor_training(recipe: Path, tmp_path: Path) -> None:
    folder, limit_s, pause_s = tmp_path / "run", 5, 7
    words = ["train.epochs=100000", f"train.step_timeout_s={limit_s}", "train.log_every_steps=1"]
    words = [word for setting in [*words, "evaluate.every_epochs=0"] for word in ("-s", setting)]
    process = command.start("train", str(recipe), "--run-dir", str(folder), *words)
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(records(folder)) > 20)
        process.send_signal(signal.SIGTSTP)
        wait_for(lambda: state(process.pid) == "T")
        begun, before = time.monotonic(), len(records(folder))
        time.sleep(pause_s)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: len(records(folder)) > before + 20)
        lasted = time.monotonic() - begun
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate(60)
    assert process.poll() == EXIT_CODE
    at = [record["train_s"] for record in records(folder)]
    assert at[before + 19] - at[before - 1] < lasted - pause_s + 1


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("fault", "step"), [("sigterm-step", 9), ("sigterm-evaluation", 2), ("sigterm-checkpoint", 9)], ids=str
)
def test_a_signal_in_the_middle_of_any_phase_loses_nothing(
    recipe: Path, tmp_path: Path, reference: list[float], fault: str, step: int
) -> None:
    done = train(recipe, tmp_path / "run", fault=fault, step=step)
    assert done.returncode == EXIT_CODE, done.stderr[-2000:]
    assert len(records(tmp_path / "run")) == whole(tmp_path / "run") < 20
    assert train(recipe, tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == reference


def test_a_second_signal_ends_at_once_and_says_what_is_saved(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command.fastssl("train", str(recipe), "--run-dir", str(folder), before=causing("two-signals", 8))
    assert done.returncode == 130, done.stderr[-2000:]
    said, again = done.stderr.strip().splitlines()[-2:]
    assert said == f"Stopped by SIGINT. The first 6 steps are saved in {folder}."
    assert again == f"Run it again: fastssl train {recipe} --run-dir {folder} --resume"
    assert whole(folder) == 6
    done = command.fastssl("train", str(recipe), "--run-dir", str(tmp_path / "b"), before=causing("two-signals", 1))
    said, again = done.stderr.strip().splitlines()[-2:]
    assert said.startswith("Stopped by SIGINT. No step is saved;")
    assert again.endswith(" --resume")


SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"


def test_a_disk_that_refuses_checkpoints_ends_nothing_before_the_end(
    recipe: Path, tmp_path: Path, reference: list[float]
) -> None:
    folder = tmp_path / "run"
    assert train(recipe, folder, fault="sigterm-step", step=4).returncode == EXIT_CODE
    done = train(recipe, folder, before=SMALL_FILES)
    assert "Training continues and tries again" in done.stderr
    assert "The checkpoint of step 20 cannot be written: File too large" in two_lines(done)
    assert losses(folder) == reference
    assert whole(folder) == 4
    assert not list((folder / "checkpoints").glob(".step*"))
    assert train(recipe, folder).returncode == 0
    assert losses(folder) == reference
    assert whole(folder) == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_there_and_takes_the_rest_later(
    recipe: Path, small_disk: Path, reference: list[float]
) -> None:
    folder = small_disk / "run"
    assert train(recipe, folder, fault="sigterm-step", step=4).returncode == EXIT_CODE
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    done = train(recipe, folder)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert whole(folder) == 4
    ballast.unlink()
    assert train(recipe, folder).returncode == 0
    assert losses(folder) == reference


def test_lines_that_cannot_be_written_end_a_run_as_a_checkpoint_does(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints wait for the lines before them, so a signal after them has saved nothing."""
    monkeypatch.setattr(Records, "flush", lambda self: "No space left on device")
    for steps, stop in ((10, -1), (3, 3)):

        def observe(record: dict[str, Any], stop: int = stop) -> None:
            if record["event"] == "step" and record["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        problem = f"checkpoint of step {steps} cannot be written: metrics.jsonl cannot be written: No space left"
        with pytest.raises(UserError, match=problem):
            fastssl.train(tiny_recipe, run_dir=tmp_path / f"{steps}", observe=observe)
        assert not (tmp_path / f"{steps}" / "summary.json").exists()


def test_the_best_checkpoint_outlives_a_better_one_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, warnings, honest = torch.nn.Linear(2, 2), list[str](), checkpoint.save

    def full_at_step_2(folder: Path, *, step: int, **parts: Any) -> Path:
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(folder, step=step, **parts)

    monkeypatch.setattr(checkpoint, "save", full_at_step_2)
    saver = Saver(tmp_path, keep=1, on_warning=warnings.append)
    optimizer = torch.optim.SGD(network.parameters())
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        saver.save(network, optimizer, step=step, state={"step": step}, best_step=best)
    saver.close()
    assert len(warnings) == 1
    assert [checkpoint.steps_in(path) for path in checkpoint.existing(tmp_path)] == [4, 1]


def test_a_read_only_run_directory_is_refused_before_anything_else(recipe: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "not a folder that can be written to" in two_lines(train(recipe, small_disk / "run"))


def test_a_data_file_that_vanished_is_missed_at_the_resume(
    recipe: Path, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.beton"
    for suffix in ("", ".json"):
        os.link(f"{tiny_data[0]}{suffix}", f"{gone}{suffix}")
    words = ("-s", f"data.path={gone}", "-s", "data.memory=mmap")
    assert train(recipe, tmp_path / "run", *words, fault="sigterm-step", step=4).returncode == EXIT_CODE
    gone.unlink()
    assert "does not exist" in two_lines(train(recipe, tmp_path / "run", *words))
    assert whole(tmp_path / "run") == 4


def test_the_first_bad_step_is_remembered_with_its_terms() -> None:
    watch = FirstBadStep()
    assert watch.values() is None
    for step, loss in enumerate([1.0, 2.0, float("inf"), 3.0, float("nan")], start=1):
        watch.watch(step, {"loss": torch.tensor(loss), "invariance": torch.tensor(float(step))})
    found = watch.values()
    assert found == (3, {"loss": float("inf"), "invariance": 3.0})


def test_steps_that_become_slow_are_warned_about_once_with_load_threads_and_remedy() -> None:
    slow = SlowSteps()
    assert slow.warning(side_px=32, steps=10, seconds=4.0) is None
    assert slow.warning(side_px=32, steps=10, seconds=11.0) is None  # not 3 times as slow
    assert slow.warning(side_px=64, steps=10, seconds=40.0) is None  # larger views
    assert slow.warning(side_px=32, steps=1, seconds=1.5) is None  # too short a spell
    text = slow.warning(side_px=32, steps=10, seconds=13.0)
    assert text is not None
    assert "1300 ms and took 400 ms" in text
    assert f"{torch.get_num_threads()} threads" in text
    assert "load" in text
    assert "train.threads" in text
    assert slow.warning(side_px=32, steps=10, seconds=100.0) is None
