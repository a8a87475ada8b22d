"""`fastssl(...)`: the command line in a process of its own, without paying for `import torch` each time.

A server imports the package once and forks a child for every command of all of pytest's processes. The child has
its own folder, environment and output, and ends as `python -m fastssl` does. Tests of what is decided while the package
is imported (threads, caches, colors, a terminal's width) start Python themselves.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

FIRST_S = 300.0
ADDRESS = "FASTSSL_TEST_COMMANDS"
PRELOADED = (
    "torch._dynamo",  # which the first optimizer of a process imports
    "fastssl.cli.app",
    "fastssl.bench.dry_run",
    "fastssl.bench.new_recipe",
    "fastssl.data.convert.convert",
    "fastssl.data.sources",
    "fastssl.pretrained.load",
    "fastssl.pretrained.embedding.embed",
    "fastssl.pretrained.evaluation.evaluate",
    "fastssl.training.loop",
    "fastssl.training.sweep",
)


class Command:
    """A command that was started; what of `subprocess.Popen` the tests need."""

    def __init__(self, words: Sequence[str], *, cwd: Path | None, env: dict[str, str], before: str) -> None:
        self.args, self.opened = words, contextlib.ExitStack()
        self.returncode: int | None = None
        self.written = (b"", b"")
        self.out, self.errors = (self.opened.enter_context(file()) for file in [tempfile.TemporaryFile] * 2)
        self.line = self.opened.enter_context(socket.socket(socket.AF_UNIX))
        self.line.settimeout(FIRST_S)
        self.line.connect(server())
        request = {"words": words, "cwd": str(cwd or os.getcwd()), "env": os.environ | env, "before": before}
        files = [self.out.fileno(), self.errors.fileno()]
        socket.send_fds(self.line, [json.dumps(request).encode() + b"\n"], files)
        self.answers = self.opened.enter_context(self.line.makefile("r"))
        self.pid = int(self.answers.readline())

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            self.wait(FIRST_S)
        return self.returncode

    def wait(self, timeout: float) -> None:
        """Until it ends."""
        if self.returncode is None:
            self.line.settimeout(timeout)
            self.returncode = int(self.answers.readline())

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """All of its output, once it ends.

        Raises:
            TimeoutExpired: after `timeout` seconds; then the command is killed.
        """
        with self.opened:
            try:
                self.wait(timeout)
            except TimeoutError:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(self.args), timeout) from None
            if not self.out.closed:
                self.written = read(self.out), read(self.errors)
        return self.written


def read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def start(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None, before: str = "") -> Command:
    """`fastssl WORDS`, going on by itself; the arguments are those of `fastssl`."""
    return Command(words, cwd=cwd, env=env or {}, before=before)


def fastssl(
    *words: str, cwd: Path | None = None, env: dict[str, str] | None = None, before: str = "", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`fastssl WORDS` with its output as text.

    Args:
        cwd: the command's folder; this process's when absent.
        env: variables besides this process's, which are read when they are needed.
        before: Python that the command's process runs first, such as a fault.
        timeout: in seconds; then the command is killed.

    Raises:
        TimeoutExpired: after `timeout`.
    """
    command = start(*words, cwd=cwd, env=env, before=before)
    out, errors = command.communicate(timeout)
    assert command.returncode is not None
    return subprocess.CompletedProcess(words, command.returncode, out.decode(), errors.decode())


@functools.cache
def server() -> str:
    """The address of the server, which all of pytest's workers share (`begin`), or else of this process's own."""
    address = os.environ.get(ADDRESS) or begin()
    deadline = time.monotonic() + FIRST_S
    while not os.path.exists(address) and time.monotonic() < deadline:
        time.sleep(0.05)
    return address


def begin() -> str:
    """Starts a server, which ends with this process; the address at which it will be found once it has imported."""
    folder = tempfile.mkdtemp(prefix="fastssl-command-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = os.path.join(folder, "socket")
    process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
    assert process.stdin is not None
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # which ends it
    return address


def serve(address: str) -> list[str]:
    """Answers requests for as long as standard input is open, each in a process; a command returns, with its words."""
    for name in PRELOADED:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        os.rename(f"{address}.new", address)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            line, _ = listener.accept()
            with line:
                if not os.fork():
                    return answer(line)
            with contextlib.suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    sys.exit()


def answer(line: socket.socket) -> list[str]:
    """Forks the command, which returns here, and tells its process and its exit code."""
    request, files, _, _ = socket.recv_fds(line, 1 << 20, 2)
    while not request.endswith(b"\n"):
        more = line.recv(1 << 20)
        if not more:  # whoever asked is gone
            os._exit(1)
        request += more
    process = os.fork()
    if not process:
        return child(json.loads(request), files)
    for file in files:
        os.close(file)
    line.sendall(b"%d\n" % process)
    line.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)


def child(request: dict[str, Any], files: list[int]) -> list[str]:
    """Takes over the folder, environment and output of the request; returns its words."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for target, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, target)
        os.close(file)
    exec(request["before"], {})
    return list(request["words"])


if __name__ == "__main__":
    sys.argv[1:] = serve(sys.argv[1])
    sys.argv[0] = "fastssl"
    from fastssl.cli import main

    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else bool(stop.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is left of Python's end is to take torch apart
