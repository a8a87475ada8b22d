"""What a process writes to a terminal of 80 x 24, and the commands in it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

COLUMNS, ROWS = 80, 24
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COMMAND = re.compile(r"^(?:[A-Z][a-z ]+: )(fastssl .+?)\s*$", re.MULTILINE)


def in_terminal(words: list[str], folder: Path, *, rc: int = 0, timeout_s: float = 60) -> str:
    """Runs a process in a folder and returns all that it wrote, with the terminal's codes.

    Args:
        words: program and arguments.
        folder: to run it in.
        rc: the exit code that it must have.
        timeout_s: for its end after the last output.
    """
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        words, cwd=folder, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
    )
    os.close(child)
    shown = b""
    try:
        while data := os.read(main, 1 << 16):
            shown += data
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(main)
    assert process.wait(timeout=timeout_s) == rc, shown.decode()
    return shown.decode()


def pasted(line: str, folder: Path) -> str:
    """A line given to a shell in a terminal: what it shows, in plain lines."""
    return ANSI.sub("", in_terminal(["bash", "-c", line], folder)).replace("\r\n", "\n")


def commands(text: str) -> list[str]:
    """The commands that a text offers, each alone on its line after a word or two and a colon."""
    return COMMAND.findall(text)
