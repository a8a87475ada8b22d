"""The backbone as a graph that runs without this package: torch.export's program, and ONNX checked with onnxruntime."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.errors import UserError
from fastssl.pretrained.export.use import literal
from fastssl.pretrained.export.weights import compare, examples, plain
from fastssl.pretrained.load import METADATA_KEY, Pretrained


def write_program(net: Pretrained, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A program of normalized images (N, C, S, S), any N, to features (N, F)."""
    ours, images = plain(net.backbone), examples(net)
    program = torch.export.export(ours, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    lines = ["import torch", f"model = torch.export.load({literal(record['file'])}).module()"]
    record = record | {"loading": lines}
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": json.dumps(record)})
    with open(path, "rb") as file:
        back = torch.export.load(file).module()
    more = examples(net, 3)
    return record | {"largest_difference": compare(ours, back(more), more, what="torch-export")}


def require_onnx() -> None:
    """UserError naming the extra unless all of it is installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Exporting to ONNX needs what is not installed: {', '.join(missing)}.",
            "Install it with `pip install 'fastssl-vision[onnx]'`.",
        )


def write_onnx(net: Pretrained, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A graph with the input `images` (N, C, S, S) and the output `features` (N, F), any N."""
    require_onnx()
    import onnx

    ours, images = plain(net.backbone), examples(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about torch's internals
        program = torch.onnx.export(
            ours,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    lines = ["import onnxruntime", f"session = onnxruntime.InferenceSession({literal(record['file'])})"]
    record = record | {"loading": [*lines, '(features,) = session.run(None, {"images": images})']}
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(record)})
    onnx.save(graph, path)
    more = examples(net, 3)
    return record | {"largest_difference": compare(ours, run_onnx(path, more), more, what="onnx")}


def run_onnx(path: Path, images_NCHW: Tensor) -> Tensor:
    """Features (N, F) that onnxruntime computes on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (features_NF,) = session.run(None, {"images": images_NCHW.numpy()})
    return torch.from_numpy(features_NF)
