"""The lines of Python that an export is used by."""

import json
from pathlib import Path
from typing import Any


def literal(text: str) -> str:
    """A string as Python and JSON write it."""
    return json.dumps(text, ensure_ascii=False)


def use_lines(record: dict[str, Any], out: Path) -> list[str]:
    """The record's lines with the file's path from here, around a batch of images of the right shape.

    Args:
        record: of an export.
        out: where it was written.
    """
    name, path = record["file"], str(out)
    loading = [line.replace(literal(name), literal(path)) for line in record["loading"]]
    loading = [line.replace(literal(f"local-dir:{name}"), literal(f"local-dir:{path}")) for line in loading]
    prepared = record["preprocessing"]
    shape = (1, prepared["channels"], prepared["side_px"], prepared["side_px"])
    if record["to"] == "onnx":
        return ["import numpy", f"images = numpy.zeros({shape}, numpy.float32)", *loading]
    # an exported program has no modes, and what fastssl loads is in the right one
    call = {True: "backbone", False: "model" if record["to"] == "torch-export" else "model.eval()"}
    ours = any(line.startswith("backbone = ") for line in loading)
    return ["import torch", f"images = torch.zeros{shape}", *loading, f"features = {call[ours]}(images)"]
