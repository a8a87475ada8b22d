"""A trained backbone in others' formats, each with a record of where it comes from and how its images are prepared.

Choice made: before a file gets its name, its weights are read back and compared with ours, and its features where
something else than fastssl computes them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from fastssl.data.manifest import manifest_path
from fastssl.data.storage import parents, writing
from fastssl.errors import UserError, errors_of, option, raise_all
from fastssl.pretrained.export import graphs, huggingface
from fastssl.pretrained.export import weights as files
from fastssl.pretrained.export.record import record_of
from fastssl.pretrained.load import Pretrained, load
from fastssl.runs.checkpoint import Kind
from fastssl.runs.files import atomic_json, atomic_path
from fastssl.training.plain import plain_torch

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


@plain_torch()
def export(
    source: str | Path | Pretrained, out: str | Path, *, to: Format, weights: Kind | None = None
) -> dict[str, Any]:
    """Writes a backbone for use elsewhere.

    Args:
        source: a run folder, exported weights, or what `load` gave.
        out: the file to make or replace; for huggingface a folder that does not exist yet.
        to: "torchvision" or "timm": weights that load with strict=True into the library's own model (.pth or
            .safetensors); "safetensors": our own names; "torch-export": a .pt2 program; "onnx": checked with
            onnxruntime; "huggingface": a folder with card, configuration and preprocessing.
        weights: of a run: "ema" or "raw"; when None the averaged ones, if the run has them. What `load` gave has those
            that it was loaded with.

    Returns:
        The record, which is also in `<out>.json` (for huggingface in `<out>/fastssl.json`) and in the metadata of every
        .safetensors file: preprocessing, accuracy, recipe, data digest, license, and the lines that load the file.

    Raises:
        UserError: when the network does not exist in that form, or a package is missing.
    """
    out = Path(out)
    raise_all(unfit(out, to))
    if isinstance(source, Pretrained) and weights not in (None, source.weights):
        raise UserError(
            f"weights is {weights!r}, and what is exported was loaded with weights {source.weights!r}.",
            "Pass weights to `load`, or give the run folder.",
        )
    net = source if isinstance(source, Pretrained) else load(source, device="cpu", weights=weights)
    record = record_of(net) | {"to": to, "file": out.name}
    with parents(out.parent), writing(out):
        with atomic_path(out) as temporary:
            match to:
                case "torchvision" | "timm":
                    record = files.write_hub(net, temporary, record, library=to, suffix=out.suffix)
                case "safetensors":
                    record = files.write_own(net, temporary, record)
                case "torch-export":
                    record = graphs.write_program(net, temporary, record)
                case "onnx":
                    record = graphs.write_onnx(net, temporary, record)
                case "huggingface":
                    record = huggingface.write_folder(net, temporary, record)
        if to != "huggingface":
            atomic_json(manifest_path(out), record)
    return record


def unfit(out: Path, to: str) -> Iterator[UserError]:
    if to not in FORMATS:
        yield UserError(f"There is no export to {to!r}.", f"Choose one of {', '.join(FORMATS)}.")
    elif out.suffix not in SUFFIXES[to]:
        wanted = "the suffix " + " or ".join(SUFFIXES[to]) if to != "huggingface" else "no suffix: it is a folder"
        yield UserError(f"{option('out', out)} does not suit {to}.", f"Give it {wanted}.")
    if out.is_dir() or (to == "huggingface" and out.exists()):
        yield UserError(f"{out} exists already.", f"Choose another {option('out')}.")
    if to == "onnx":
        yield from errors_of(graphs.require_onnx)
