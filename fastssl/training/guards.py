"""What watches over a run: signals, values that are not finite, memory, steps that never end, and torch's flags."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastssl.errors import UserError
from fastssl.losses.loss import Terms
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which is what --resume does
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
# glibc maps each block above 32 MB anew and trims its heap, so a training step on the CPU pays for the same pages again
# and again; a thread that makes batches has a heap of its own, which is trimmed whatever is asked for.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_BYTES = (1 << 31) - 1  # mallopt takes an int
MAPPED_BYTES = 1 << 30


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


class FirstBadStep:
    """Remembers, on the device, the first step with a value that is not finite.

    Watching launches a few tiny kernels; only `values` waits for the device.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.first_bad: Tensor | None = None
        self.norms: Tensor | None = None  # how many in a row were not finite, and the last

    def watch(self, step: int, terms: Terms, *, norm: Tensor | None = None) -> None:
        """Looks at the scalars of one step.

        Args:
            step: its number.
            terms: those that have to be finite.
            norm: of the gradient, where one that is not finite is left out: `in_a_row` counts those.

        Raises:
            UserError: for other terms than before, which a loss from Python may give.
        """
        self.names = self.names or tuple(terms)
        if terms.keys() != {*self.names}:
            differing = ", ".join(sorted(terms.keys() ^ self.names))
            raise UserError(
                f"loss returned other terms in step {step} than before: {differing}.",
                "Return the same terms at every step.",
            )
        values = torch.stack([terms[name].detach().float().reshape(()) for name in self.names])
        bad = ~torch.isfinite(values).all()
        now = torch.cat([torch.where(bad, step, -1).float().reshape(1), values])
        if norm is not None:
            last = norm.detach().float()
            before = torch.zeros_like(last) if self.norms is None else self.norms[0]
            self.norms = torch.stack([torch.where(torch.isfinite(last), 0.0, before + 1), last])
        self.first_bad = now if self.first_bad is None else torch.where(self.first_bad[0] >= 0, self.first_bad, now)

    def in_a_row(self) -> int:
        """Steps up to now whose gradient was not finite; waits for the device."""
        return 0 if self.norms is None else int(self.norms[0])

    def last_norm(self) -> float:
        """Of the gradient, of the last step; waits for the device."""
        return float("nan") if self.norms is None else float(self.norms[1])

    def values(self) -> tuple[int, dict[str, float]] | None:
        """The step and its scalars, or None while all is well; waits for the device."""
        if self.first_bad is None or float(self.first_bad[0]) < 0:
            return None
        step, *values = self.first_bad.tolist()
        return int(step), dict(zip(self.names, values, strict=True))


def not_finite(
    step: int, terms: dict[str, float], network: nn.Module, *, last_good: str, graph: bool = False
) -> UserError:
    """What to say when a run met a value that is not finite."""
    listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    no_graph = " and train.cuda_graph to false" if graph else ""
    return UserError(
        f"The loss or its gradient is not finite at step {step}: {listed}; {largest_weight(network)}.",
        f"Lower optim.lr, set optim.clip_norm, or set train.on_nonfinite to skip{no_graph}; {last_good}.",
    )


def largest_weight(network: nn.Module) -> str:
    """Names the parameter with the largest value, or the first that is not finite."""
    name, value = "", 0.0
    for key, parameter in network.named_parameters():
        here = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if not here <= value:  # also when here is nan
            name, value = key, here
        if not here < float("inf"):
            break
    return f"largest weight {value:.4g} in {name}"


@contextlib.contextmanager
def memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turns a lack of memory in a step into what was asked for and the settings that halve it.

    Raises:
        UserError: in place of torch's and Python's out-of-memory errors.
    """
    batch, rows = recipe.data.batch_size, view_table(recipe.augment)
    parts = recipe.optim.accumulate_steps * 2
    with lack_explained(
        f"with data.batch_size {batch} and {len(rows)} views of {max(r.side_px for r in rows)} px",
        f"Set data.batch_size to {max(2, batch // 2)}, optim.accumulate_steps to {parts} (loss and batch statistics"
        " are then each part's own), train.gradient_checkpointing to true, or fewer augment.views.",
    ):
        yield


@contextlib.contextmanager
def evaluation_explained(recipe: Recipe, *, where: str = "", more: str = "") -> Iterator[None]:
    """The same in an evaluation.

    Args:
        recipe: of the network that is evaluated.
        where: of a finished run, the file that holds its settings.
        more: another remedy.

    Raises:
        UserError: in place of torch's and Python's out-of-memory errors.
    """
    batch = recipe.evaluate.batch_size
    with lack_explained(
        f"in an evaluation with evaluate.batch_size {batch}",
        f"Set evaluate.batch_size to {max(1, batch // 2)}{where}{more}.",
    ):
        yield


@contextlib.contextmanager
def lack_explained(where: str, fix: str) -> Iterator[None]:
    """UserError in place of torch's and Python's out-of-memory errors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        asked = " ".join((str(error).strip() or "allocation refused").splitlines()[0].split())
        raise UserError(f"Out of memory {where}: {asked[:200].rstrip('.')}.", fix) from error


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))


class SlowSteps:
    """Notices, once, that steps on the CPU take several times as long as they did."""

    FACTOR, LEAST_S = 3.0, 2.0  # shorter spells say little

    def __init__(self) -> None:
        self.fastest_s: dict[int, float] = {}  # by side of views
        self.warned = False

    def warning(self, *, side_px: int, steps: int, seconds: float) -> str | None:
        """One sentence with the remedy, when this spell of steps is the first slow one.

        Args:
            side_px: largest side of the spell's views.
            steps: of the spell, at least 1.
            seconds: that they took.
        """
        step_s = seconds / steps
        fastest_s = self.fastest_s[side_px] = min(step_s, self.fastest_s.get(side_px, step_s))
        if self.warned or seconds < self.LEAST_S or step_s < self.FACTOR * fastest_s:
            return None
        self.warned = True
        load = f"a load of {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "an unknown load"
        return (
            f"Steps take {1e3 * step_s:.0f} ms and took {1e3 * fastest_s:.0f} ms before: this machine has {load}, and"
            f" the run uses {torch.get_num_threads()} threads. Stop other programs, set train.threads to 1,"
            " or set model.batch_norm to per_view in a new run."
        )


class Watchdog:
    """Ends the process with a stack of every thread in the log when no step finishes for `limit_s` seconds.

    Python itself may be stuck in a collective or a read, so a thread of the interpreter's own does it. A pause by
    SIGTSTP (Ctrl-Z, a suspended SLURM job) does not count; one by SIGSTOP looks like a step that hangs.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.paused_s = 0.0
        self.before: Any = None

    def __enter__(self) -> "Watchdog":
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            self.before = signal.signal(signal.SIGTSTP, self.pause)
        self.pat()
        return self

    def pause(self, number: int, frame: FrameType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        start = time.perf_counter()
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when the process is continued
        self.paused_s += time.perf_counter() - start
        self.pat()

    def clock(self) -> float:
        """Seconds on the monotonic clock without the pauses."""
        return time.perf_counter() - self.paused_s

    def pat(self) -> None:
        """Starts the time anew."""
        if sys.__stderr__ is not None:
            # One without a descriptor, or more seconds than a clock holds: never.
            with contextlib.suppress(RuntimeError, ValueError, OSError, OverflowError):
                faulthandler.dump_traceback_later(self.limit_s, exit=True, file=sys.__stderr__)

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.before is not None:
            signal.signal(signal.SIGTSTP, self.before)


def keep_freed_memory() -> bool:
    """Ask malloc to reuse freed blocks up to 1 GB; the process then keeps its peak. False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, MAPPED_BYTES), (M_TRIM_THRESHOLD, LARGEST_BYTES), (M_ARENA_MAX, 1))
    accepted = [mallopt(name, value) for name, value in wanted]
    return accepted == [1, 1, 1]


@contextlib.contextmanager
def torch_settings(recipe: Recipe) -> Iterator[None]:
    """TF32 for what stays float32 on CUDA, deterministic kernels, and cuDNN's search, as the recipe says."""
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    deterministic = recipe.train.deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    apply_flags(("high" if recipe.train.tf32 else "highest", recipe.train.tf32, not deterministic, deterministic))
    try:
        yield
    finally:
        apply_flags(before)


def apply_flags(values: tuple[str, bool, bool, bool]) -> None:
    precision, cudnn_tf32, search, deterministic = values
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = search
    torch.use_deterministic_algorithms(deterministic)
