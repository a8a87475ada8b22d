"""Compile the CUDA kernels for GPUs that are not here, and count what the compiler made of them.

No GPU and no driver is needed: a stand-in for Triton's driver names the target, every launch compiles and runs nothing,
and the wheel's own cuobjdump and nvdisasm read the binaries. So what is compiled is what a launch would compile, types
and alignments included. Another Triton is chosen by PYTHONPATH:

    python tools/cuda_kernels.py --out bench/results/cuda_kernels.json      # 32 cases, minutes of one core
    python tools/cuda_kernels.py --cases few                                # what the tests look at, JSON on stdout
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastssl.augment.augment import Augment
from fastssl.augment.backend import backend_of
from fastssl.augment.cuda import resample
from fastssl.augment.policy import View
from fastssl.bench.record import row, write
from fastssl.data.batch import Batch
from fastssl.recipe.schema import ViewSpec

NAMES = {0: "crop", 1: "rotate", 2: "color", 3: "blur"}
JITTER = {"hflip_p": 0.5, "jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
CROP = {"crop": "random_resized", **JITTER, "gray_p": 0.2, "solarize_p": 0.1, "cutout_p": 0.1, "posterize_p": 0.1}
POLICIES: dict[str, dict[str, Any]] = {
    "still": CROP,
    "blurring": {**CROP, "blur_p": 0.5},
    "rotating": {**CROP, "blur_p": 0.5, "rotate_p": 0.5, "rotate_max_deg": 30.0, "quarter_turn_p": 0.5},
    "linear": {**CROP, "contrast": 0.0, "hue_mode": "linear"},
}
SIDES = (32, 64, 96, 224)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# warps and registers of a multiprocessor, and its largest shared memory in bytes (CUDA C++ Programming Guide, 12.9)
LIMITS = {80: (64, 65536, 167936), 90: (64, 65536, 233472), 100: (64, 65536, 233472), 120: (48, 65536, 102400)}
# a smaller tensor is no pixels: sums of tiles, a view's numbers
LEAST_PIXELS = 16 * 16
ROWS, COLUMNS = resample.ROWS.value, resample.COLUMNS.value
FIELD = re.compile(r"(\w+) = \[([\d, ]+)\]")
METRICS = ("registers", "local", "shared_bytes", "warps_per_sm", "instructions", "lanes_in_a_row")
NO_LAUNCH = {"empty", "empty_strided", "new_empty", "view", "slice", "select", "expand", "permute", "detach", "alias"}
NO_LAUNCH |= {"as_strided", "_unsafe_view", "t", "transpose", "unsqueeze", "squeeze", "unbind", "split", "lift_fresh"}


class Driver:
    """Answers what a launch asks of Triton's driver, for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        # each target a device of its own: Triton asks for the target once a device, and keeps its kernels with it
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Within, every launch compiles for that GPU instead, and (name, kernel) of each is listed."""
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        name = "params" if "STAGE" not in named else NAMES[named["STAGE"]]
        launched.append((name, kernel))
        return kernel

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


class Launches(TorchDispatchMode):
    """Counts torch operators that launch a kernel on a GPU; those that only make or view a tensor do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def case_of(
    side_px: int,
    *,
    policy: str = "blurring",
    channels: int = 3,
    dtype: str = "bf16",
    pixel: str = "uint8",
    layout: str = "padded",
    interpolation: str = "bilinear",
    capability: int = 90,
) -> dict[str, Any]:
    """One cell of the matrix, as a row's `work`."""
    return locals()


def few_cases() -> list[dict[str, Any]]:
    """A small set in which every pass, layout, precision, interpolation and hue mode occurs, for three GPUs."""
    return [
        case_of(32),
        case_of(224, policy="rotating"),
        case_of(64, policy="linear", layout="flat", interpolation="bicubic", capability=120),
        case_of(96, policy="rotating", channels=4, pixel="uint16", layout="flat", capability=80),
    ]


def every_case() -> list[dict[str, Any]]:
    """Every side with every policy; then each other choice for itself, for a view of one tile and for one of many."""
    cases = [case_of(side, policy=policy) for side in SIDES for policy in ("still", "blurring", "rotating")]
    others = [("channels", 1), ("channels", 4), ("layout", "flat"), ("interpolation", "bicubic"), ("pixel", "uint16")]
    others += [("dtype", "fp16"), ("dtype", "fp32"), *(("capability", sm) for sm in LIMITS if sm != 90)]
    for side, (name, value) in product((32, 224), others):
        # a view that rotates is never one tile, so the small ones blur only
        cases.append(case_of(side, policy="blurring" if side <= 64 else "rotating", **{name: value}))
    return cases


def prepared(case: dict[str, Any], *, batch: int = 128, views: int = 4, first: int = 0) -> tuple[Augment, Batch]:
    """The augmentation of a case and a batch for it, whose first sample has index `first`."""
    spec = ViewSpec(side_px=case["side_px"], interpolation=case["interpolation"], **POLICIES[case["policy"]])
    channels, pixel, half = case["channels"], getattr(torch, case["pixel"]), (0.5,) * case["channels"]
    augment = Augment((View(**spec.model_dump()),) * views, half, half, 0, DTYPES[case["dtype"]], backend_of("cuda"))
    index_B = torch.arange(first + batch)[first:]  # slices, as loaders cut them: their places are odd
    if case["layout"] == "padded":
        pool = torch.zeros((first + batch, 41, 39, channels), dtype=pixel)
        return augment, Batch(pool[first:], index_B, index_B)
    pixels, sizes_B2 = torch.zeros(40 * 40 * channels, dtype=pixel), torch.full((batch, 2), 40)
    return augment, Batch(pixels, index_B, index_B, sizes_B2, torch.zeros_like(index_B))


def launches_of(case: dict[str, Any], **batch: int) -> list[str]:
    """Names of everything that one batch launches, once its constants lie on the device."""
    augment, images = prepared(case, **batch)
    with compiling(case["capability"]) as kernels:
        augment(images, 3)
        kernels.clear()
        with Launches() as operators:
            augment(images, 4)
    return [name for name, _ in kernels] + operators.names


def added_variants(case: dict[str, Any]) -> int:
    """Kernels that later batches of the same images compile: another epoch, odd sizes, groups and places."""
    with compiling(case["capability"]) as kernels:
        of_calls = []
        for epoch, (batch, first) in enumerate(((128, 0), (128, 0), (127, 1), (61, 3), (1, 5))):
            augment, images = prepared(case, batch=batch, first=first)
            augment(images, epoch)
            of_calls.append({kernel.hash for _, kernel in kernels})
    return len(of_calls[-1] - of_calls[0])


def resources(kernel: Any, capability: int) -> dict[str, int]:
    """What a compiled kernel takes, from its binary.

    Returns:
        registers a thread, local loads and stores, shared bytes, warps, warps that fit a multiprocessor, instructions.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = output(tools / "cuobjdump", "--dump-resource-usage", str(binary))
        code = output(tools / "nvdisasm", "-c", str(binary))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)", code, re.MULTILINE)
    local = sum(name.startswith(("LDL", "STL")) for name in lines)
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return {
        "registers": registers,
        "local": local,
        "shared_bytes": shared,
        "warps": warps,
        "warps_per_sm": occupancy(registers, shared, warps, capability),
        "instructions": sum(name != "NOP" for name in lines),
    }


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """Warps of this kernel that fit a multiprocessor at once."""
    most, file, memory = LIMITS[capability]
    of_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256
    programs = min(most // warps, file // (of_warp * warps), memory // (shared + 1024), 32)
    return programs * warps


def output(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def lanes_in_a_row(kernel: Any) -> int:
    """Of a warp's 32 lanes, how many follow one another along a row of pixels, at the worst load or store of any.

    They are those of pixels, scratch and views; a square of pixels, or one row after another in one dimension.
    """
    text, fewest = kernel.asm["ttgir"], 32
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>$", text, re.MULTILINE))
    accesses = re.findall(r"tt\.(?:load|store) .*: tensor<((?:\d+x)+)!tt\.ptr<[^>]*>, (.*)> loc", text)
    assert len(accesses) == len(re.findall(r"tt\.(?:load|store) .*: tensor", text))
    for shape, name in accesses:
        size = [int(number) for number in shape.split("x")[:-1]]
        if math.prod(size) < LEAST_PIXELS:
            continue
        layout = {key: [int(x) for x in value.split(", ")] for key, value in FIELD.findall(layouts[name])}
        # of one dimension are a product's ROWS x COLUMNS source pixels and a square tile
        width = size[-1] if len(size) == 2 else COLUMNS if size == [ROWS * COLUMNS] else math.isqrt(size[0])
        along = layout["order"][0] == len(size) - 1
        fewest = min(fewest, layout["threadsPerWarp"][-1], width // layout["sizePerThread"][-1]) if along else 1
    return fewest


def look(case: dict[str, Any], **batch: int) -> list[dict[str, Any]]:
    """The kernels of a case, each once: what they take and whether they are as they should be."""
    augment, images = prepared(case, **batch)
    with compiling(case["capability"]) as launched:
        augment(images, 3)
    kernels = dict(launched)
    assert all(kernel.metadata.target.arch == case["capability"] for kernel in kernels.values())
    return [
        {
            "kernel": name,
            **resources(kernel, case["capability"]),
            "mma": "mma.sync" in kernel.asm["ptx"],
            "lanes_in_a_row": lanes_in_a_row(kernel),
        }
        for name, kernel in kernels.items()
    ]


def looked_at(cases: list[dict[str, Any]], workers: int) -> Iterator[list[dict[str, Any]]]:
    """`look` at each case in order, in so many processes; with one in this process."""
    if workers == 1:
        yield from map(look, cases)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(look, cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=("few", "every"), default="every")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile")
    parser.add_argument("--out", type=Path, help="a benchmark record; without it, JSON on stdout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cuda_kernels.") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        compile_all(arguments)


def compile_all(arguments: argparse.Namespace) -> None:
    """Every case, then its record or the JSON."""
    cases, found = few_cases() if arguments.cases == "few" else every_case(), []
    for case, kernels in zip(cases, looked_at(cases, arguments.workers), strict=True):
        found += [{"case": case, **kernel} for kernel in kernels]
        print(len(found), case, file=sys.stderr, flush=True)
        if arguments.out is not None:  # after each case: what a stopped call has compiled is not lost
            write(arguments.out, "cuda_kernels", rows_of(found), triton=triton.__version__)
    if arguments.out is None:
        launches = {case["side_px"]: launches_of(case) for case in cases[:2]}
        variants = {case["side_px"]: added_variants(case) for case in cases[:2]}
        print(json.dumps({"triton": triton.__version__, "kernels": found, "launches": launches, "added": variants}))


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row(one["kernel"], one["case"], metric, [one[metric]]) for one in found for metric in METRICS]


if __name__ == "__main__":
    main()
