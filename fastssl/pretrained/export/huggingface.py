"""A folder as the Hugging Face hub holds models: card, configuration, preprocessing and weights; nothing is uploaded.

timm reads the folder itself where the network is one of timm's; elsewhere `fastssl.load` does, and the card says so.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastssl.data.loaders.choose import installed
from fastssl.errors import UserError
from fastssl.models import hub
from fastssl.pretrained.export.use import literal
from fastssl.pretrained.export.weights import hub_model_of, own_lines, plain, save, tensors_of, try_on
from fastssl.pretrained.load import EXPORTED, Pretrained

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_folder(net: Pretrained, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    hub_model = timm_model(net)
    if hub_model and installed("timm"):  # which reads the folder by itself
        try_on(hub_model, net)
    record = record | {"loading": loading(record, hub_model)}
    path.mkdir()
    save(path / EXPORTED, tensors_of(plain(net.backbone)), record, suffix=".safetensors")
    texts = {
        "config.json": json.dumps(config(record, hub_model), indent=1),
        "preprocessor_config.json": json.dumps(processor(record["preprocessing"]), indent=1),
        "fastssl.json": json.dumps(record, indent=1),
        "README.md": card(record, library="timm" if hub_model else "fastssl"),
    }
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    return record


def timm_model(net: Pretrained) -> hub.HubModel | None:
    """timm's own model for these weights, where it needs no change; timm itself need not be installed for others."""
    try:
        hub_model = hub_model_of(net, "timm")
    except UserError:
        return None
    return None if hub_model.edits else hub_model


def loading(record: dict[str, Any], hub_model: hub.HubModel | None) -> list[str]:
    if hub_model is None:
        return own_lines(record)
    place = literal(f"local-dir:{record['file']}")
    return ["import timm", f"model = timm.create_model({place}, pretrained=True)"]


def config(record: dict[str, Any], hub_model: hub.HubModel | None) -> dict[str, Any]:
    prepared = record["preprocessing"]
    pretrained = {
        "input_size": [prepared["channels"], prepared["side_px"], prepared["side_px"]],
        "mean": prepared["mean"],
        "std": prepared["std"],
        "interpolation": prepared["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": 0,
    }
    # timm looks up the first convolution's name to adapt it: the weights have the right number of channels already
    arguments = {k: v for k, v in hub_model.arguments.items() if k != "num_classes"} if hub_model else {}
    return {
        "architecture": hub_model.name if hub_model else record["backbone"],
        "num_classes": 0,
        "num_features": record["features_dim"],
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def processor(prepared: dict[str, Any]) -> dict[str, Any]:
    """In the words of transformers' image processors, which know no square cut before the resizing.

    So they are set to do neither: images come in through the card's own lines.
    """
    side = {"height": prepared["side_px"], "width": prepared["side_px"]}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": prepared["channels"] == 3,
        "do_resize": False,
        "size": {"shortest_edge": prepared["side_px"]},
        "resample": RESAMPLE[prepared["interpolation"]],
        "do_center_crop": False,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / float(np.iinfo(prepared["dtype"]).max),
        "do_normalize": True,
        "image_mean": prepared["mean"],
        "image_std": prepared["std"],
    }


def card(record: dict[str, Any], *, library: str) -> str:
    """README.md with the hub's header."""
    head = {
        "license": "other",
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", record["recipe"]["loss"]["name"].replace("_", "-"), "fastssl"],
    }
    rows = [f"| {name} | {value:.2f} % |" for name, value in record["accuracy"].items()]
    table = ["| measured | accuracy |", "|---|---|", *rows] if rows else ["No accuracy is recorded for these weights."]
    data = record["data"]
    parts = [
        f"# {record['name']}",
        f"A {record['backbone']} pretrained without labels by fastssl {record['fastssl']}: an image in, "
        f"{record['features_dim']} features out.",
        fenced("python", record["loading"]),
        "## Images",
        "\n".join(f"{i}. {step}" for i, step in enumerate(record["preprocessing"]["steps"], 1)),
        *([fenced("python", record["preprocessing"]["code"])] if record["preprocessing"]["code"] else []),
        f"Mean {record['preprocessing']['mean']}, std {record['preprocessing']['std']}.",
        "## Accuracy",
        "\n".join(table),
        "## Data",
        f"{data.get('count', 'An unknown number of')} images, digest `{data.get('digest')}`.",
        "## License",
        record["license"],
        "## Recipe",
        fenced("yaml", [yaml.safe_dump(record["recipe"], sort_keys=False).strip()]),
    ]
    return "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + "\n\n".join(parts) + "\n"


def fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
