"""The clock of training waits for the device before it is read, whatever is due then."""

import time
from pathlib import Path
from typing import Any

import pytest
from tiny import one_torch_thread, tiny

from fastssl import build
from fastssl.losses.loss import Terms
from fastssl.training import guards, saver
from fastssl.training.loop import train
from fastssl.training.step import Step

STEP_S = 0.2


class SlowDevice:
    """Each step leaves a fifth of a second of work; whoever waits for the device first, waits for all of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.queued_s, self.waits = 0.0, 0
        take, values, snapshot = Step.__call__, guards.FirstBadStep.values, saver.Saver.save

        def step(this: Step, views: Any, lr: float, **more: Any) -> Terms:
            self.queued_s += STEP_S
            return take(this, views, lr, **more)

        def look(this: guards.FirstBadStep) -> Any:
            self.wait()
            return values(this)

        def save(this: saver.Saver, *args: Any, **more: Any) -> None:
            self.wait()
            snapshot(this, *args, **more)

        patch.setattr(Step, "__call__", step)
        patch.setattr(guards.FirstBadStep, "values", look)
        patch.setattr(saver.Saver, "save", save)
        patch.setattr(build.hardware, "wait", lambda device: self.wait(), raising=False)

    def wait(self) -> None:
        self.waits += self.queued_s > 0
        time.sleep(self.queued_s)
        self.queued_s = 0.0


@pytest.mark.parametrize(
    ("train_keys", "evaluate_keys", "waits"),
    [
        ({"log_every_steps": 1}, {}, 20),
        ({"checkpoint_every_steps": 1}, {}, 20),
        ({}, {"every_steps": 1, "linear_epochs": 0}, 20),
        ({}, {}, 4),
    ],
    ids=["log", "save", "evaluate", "epochs alone"],
)
def test_what_the_device_still_works_at_is_training(
    train_keys: dict[str, Any],
    evaluate_keys: dict[str, Any],
    waits: int,
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SlowDevice(monkeypatch)
    sections = {"train": {"epochs": 4, "log_every_steps": 100} | train_keys, "evaluate": evaluate_keys}
    with one_torch_thread():
        summary = train(tiny((tiny_data[0], None), **sections), run_dir=tmp_path)
    assert device.waits == waits
    assert summary["train_s"] >= 20 * STEP_S
