"""`fastssl export`: take the backbone away, in a format of others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastssl.cli.app import JsonOption, app, print_result

Format = Literal["torchvision", "timm", "safetensors", "torch-export", "onnx", "huggingface"]


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run folder, or exported weights.")],
    to: Annotated[Format, typer.Option(help="What to write.")],
    out: Annotated[Path, typer.Option(help="The file; for huggingface a folder that does not exist yet.")],
    weights: Annotated[
        Literal["ema", "raw"] | None, typer.Option(help="Averaged or raw; averaged when absent, if the run has them.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a backbone for use elsewhere, with its preprocessing, accuracy, recipe and data digest."""
    from fastssl.data.manifest import manifest_path
    from fastssl.pretrained.export.export import export as run
    from fastssl.pretrained.export.use import use_lines

    record = run(source, out, to=to, weights=weights)
    changes = [f"Changes to the library's model: {record['changes']}."] if "changes" in record else []
    step = f", checkpoint of step {record['step']:,}" if record["step"] is not None else ""
    step += ", averaged weights (optim.ema)" if record["weights"] == "ema" else ""
    lines = [f"{out}: {record['backbone']}, {record['features_dim']} features{step}", *changes]
    card = out / "README.md" if to == "huggingface" else manifest_path(out)
    lines += [f"How to prepare an image: {card}", "In Python:", *use_lines(record, out)]
    print_result(record, "\n".join(lines), as_json)
