"""`fastssl(...)`: the command line in a process of its own, without paying for `import torch` each time.

A server, one for each process of pytest, imports the package once and forks a child for every command. The child has
its own folder, environment and output, and ends as `python -m fastssl` does. Tests of what is decided while the package
is imported (threads, caches, colors, a terminal's width) start Python themselves.
"""

import atexit
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

FIRST_S = 300.0
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
    environment = {**os.environ, **(env or {})}
    request = {"words": words, "cwd": str(cwd or os.getcwd()), "env": environment, "before": before}
    with socket.socket(socket.AF_UNIX) as line, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        line.settimeout(FIRST_S)
        line.connect(server())
        socket.send_fds(line, [json.dumps(request).encode() + b"\n"], [out.fileno(), errors.fileno()])
        answers = line.makefile("r")
        process = int(answers.readline())
        line.settimeout(timeout)
        try:
            code = int(answers.readline())
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(words), timeout) from None
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, out.read().decode(), errors.read().decode())


@functools.cache
def server() -> str:
    """The address of this process's server, which ends with it."""
    folder = tempfile.mkdtemp(prefix="fastssl-command-")
    address = f"{folder}/socket"
    process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # which ends it
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    return address


def serve(address: str) -> list[str]:
    """Answers requests for as long as standard input is open; a forked child returns, with its words."""
    for name in PRELOADED:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            line, _ = listener.accept()
            with line:
                request, files, _, _ = socket.recv_fds(line, 1 << 20, 2)
                while not request.endswith(b"\n"):
                    request += line.recv(1 << 20)
                process = os.fork()
                if not process:
                    return child(json.loads(request), files)
                for file in files:
                    os.close(file)
                line.sendall(b"%d\n" % process)
                line.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    sys.exit()


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
