"""Signals that end a run politely: the step is finished, a checkpoint saved, and the process exits with code 75."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which is what --resume does
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised by the loop after a signal, when the checkpoint is written."""

    def __init__(self, name: str, run_dir: Path) -> None:
        super().__init__(f"Stopped by {name} after saving. Continue with --resume --run-dir {run_dir}.")
        self.name = name


class Interrupts:
    """While entered, remembers the first of SIGTERM, SIGINT and SIGUSR1; a second one acts as usual."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self.before[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
