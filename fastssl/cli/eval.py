"""`fastssl eval`: how good a trained network is."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastssl.cli.app import DeviceOption, DownloadOption, JsonOption, OnErrorOption, app, print_result

On = Literal["val", "test", "pretraining"]


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN|WEIGHTS", help="A run, a checkpoint in it, or .safetensors.")],
    recipe: Annotated[str | None, typer.Option(help="Recipe of weights that are not in a run.")] = None,
    data: Annotated[str | None, typer.Option(help="Labeled images of another set: a .beton or a source.")] = None,
    test: Annotated[str | None, typer.Option(help="That set's test images; implies --on test.")] = None,
    on: Annotated[On | None, typer.Option(help="Judge on held-out labels, on test, or without labels.")] = None,
    probe: Annotated[
        str, typer.Option(help="Any of knn, whitened_knn, ridge, linear, finetune, separated by commas.")
    ] = "knn,ridge,linear",
    views: Annotated[str, typer.Option(help="Average features over so many views; 1 is the clean image.")] = "1",
    layers: Annotated[
        str, typer.Option(help="Features of backbone, projector, or both, separated by commas.")
    ] = "backbone",
    few_label: Annotated[str, typer.Option(help="Also learn from these percentages of the labels: 1,10.")] = "",
    linear_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the linear probe.")] = 200,
    finetune_epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning.")] = 10,
    finetune_lr: Annotated[float, typer.Option(help="Learning rate of fine-tuning.")] = 1e-3,
    checkpoint: Annotated[str, typer.Option(metavar="best|last|PATH", help="Which checkpoint of a run.")] = "last",
    side_px: Annotated[int | None, typer.Option(help="Side of the images judged; the run's own when absent.")] = None,
    page: Annotated[bool, typer.Option(help="Without labels, also draw neighbors and a map, in RUN/images/.")] = True,
    on_error: OnErrorOption = "fail",
    download: DownloadOption = True,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Judge a trained network: kNN, ridge, linear probe, few labels, fine-tuning, transfer; each with an interval."""
    options = {
        "probes": words(probe),
        "views": numbers(views, int),
        "layers": words(layers),
        "few_label_pct": numbers(few_label, float),
    }
    from fastssl.cli.eval_tables import table
    from fastssl.pretrained.evaluation.evaluate import evaluate as judge
    from fastssl.training.progress import file_progress

    with file_progress("Working on") as progress:
        record = judge(
            run,
            recipe=recipe,
            data=data,
            test=test,
            on=on,
            linear_epochs=linear_epochs,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            device=device,
            checkpoint=checkpoint,
            side_px=side_px,
            on_error=on_error,
            download=download,
            progress=progress,
            **options,
        )
    text = table(record)
    if page and record["on"] == "pretraining" and side_px is not None:
        print("Warning: no page of images: it shows features at the run's own side.", file=sys.stderr)
    elif page and record["on"] == "pretraining":
        from fastssl.report import image_page

        record["page"] = image_page(
            run, checkpoint=checkpoint, device=device, on_warning=lambda line: print(line, file=sys.stderr)
        )
        text += f"\nNeighbors, spectrum and map: {record['page']}" if record["page"] else ""
    print_result(record, text, as_json)
    if record.get("not_kept"):
        print(f"Warning: {record['not_kept']}", file=sys.stderr)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, kind: type) -> list:
    """Of the words, those that are none as they stand: the evaluation names all that is wrong at once."""
    return [number_of(word, kind) for word in words(text)]


def number_of(word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        return word
