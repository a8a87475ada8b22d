"""A trained backbone in others' formats, each with a record of where it comes from and how its images are prepared.

Choice made: what is written has been read back and compared with our own features before it gets its name.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from fastssl.data.manifest import manifest_path
from fastssl.data.storage import parents, temporary_name, writing
from fastssl.errors import UserError
from fastssl.pretrained.export import graphs, huggingface, weights
from fastssl.pretrained.export.record import record_of
from fastssl.pretrained.load import Pretrained, load

Format = Literal["torchvision", "timm", "safetensors", "torch-export", "onnx", "huggingface"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, tuple[str, ...]] = {
    "torchvision": (".pth", ".safetensors"),
    "timm": (".safetensors", ".pth"),
    "safetensors": (".safetensors",),
    "torch-export": (".pt2",),
    "onnx": (".onnx",),
    "huggingface": ("",),
}


def export(source: str | Path | Pretrained, out: str | Path, *, to: Format) -> dict[str, Any]:
    """Writes a backbone for use elsewhere.

    Args:
        source: a run folder, exported weights, or what `load` gave.
        out: the file to make or replace; for huggingface a folder that does not exist yet.
        to: "torchvision" or "timm": weights that load with strict=True into the library's own model (.pth or
            .safetensors); "safetensors": our own names; "torch-export": a .pt2 program; "onnx": checked with
            onnxruntime; "huggingface": a folder with card, configuration and preprocessing.

    Returns:
        The record, which is also in `<out>.json` (for huggingface in `<out>/fastssl.json`) and in the metadata of every
        .safetensors file: preprocessing, accuracy, recipe, data digest, licence, and the lines that load the file.

    Raises:
        UserError: when the network does not exist in that form, or a package is missing.
    """
    out = Path(out)
    check(out, to)
    net = source if isinstance(source, Pretrained) else load(source, device="cpu")
    record = record_of(net) | {"to": to, "file": out.name}
    part = temporary_name(out, "part")
    with parents(out.parent), writing(out):
        try:
            match to:
                case "torchvision" | "timm":
                    record = weights.write_stock(net, part, record, library=to, suffix=out.suffix)
                case "safetensors":
                    record = weights.write_own(net, part, record)
                case "torch-export":
                    record = graphs.write_program(net, part, record)
                case "onnx":
                    record = graphs.write_onnx(net, part, record)
                case "huggingface":
                    record = huggingface.write_folder(net, part, record)
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        if to != "huggingface":
            manifest_path(out).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def check(out: Path, to: str) -> None:
    if to not in FORMATS:
        raise UserError(f"There is no export to {to!r}.", f"Choose one of {', '.join(FORMATS)}.")
    if out.suffix not in SUFFIXES[to]:
        wanted = "the suffix " + " or ".join(SUFFIXES[to]) if to != "huggingface" else "no suffix: it is a folder"
        raise UserError(f"--out {out} does not suit {to}.", f"Give it {wanted}.")
    if out.is_dir() or (to == "huggingface" and out.exists()):
        raise UserError(f"{out} exists already.", "Choose another --out.")
    if to == "onnx":
        graphs.require_onnx()
