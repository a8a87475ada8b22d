"""The typer application, the options that verbs share, and how a verb prints its result."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from fastssl import __version__
from fastssl.cli.stopped import explained
from fastssl.runs.files import json_text

WORKFLOW = (
    *("doctor", "recipes", "recipe", "convert", "preview", "train"),
    *("sweep", "runs", "eval", "report", "embed", "duplicates", "export", "bench"),
)


class InOrderOfUse(TyperGroup):
    """Lists the verbs as one comes to need them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=WORKFLOW.index)

    def invoke(self, ctx: Any) -> Any:
        with explained():  # here: typer ends without a word
            return super().invoke(ctx)


app = typer.Typer(
    cls=InOrderOfUse,
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> None:
    if asked:
        print(f"fastssl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pretrain a vision backbone on unlabeled images as fast as the hardware allows."""


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")]
RecipeOrImagesArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, a shipped recipe's name, or images: a folder, archive, table or .beton."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to run.")]
# of verbs that read a source
Split = Literal["train", "test", "val", "unlabeled"]
SplitOption = Annotated[Split, typer.Option(help="Which part of the source.")]
OnErrorOption = Annotated[
    Literal["fail", "skip"], typer.Option(help="List images that cannot be read and fail, or leave them out.")
]
ImageColumnOption = Annotated[str | None, typer.Option(help="Column of images, or of their paths (tables only).")]
LabelColumnOption = Annotated[str | None, typer.Option(help="Column of labels (tables only).")]
ImageRootOption = Annotated[Path | None, typer.Option(help="Folder that the paths of a .csv start from.")]
ImageKeyOption = Annotated[
    str | None, typer.Option(help="Suffix of the image in WebDataset samples that hold several, such as left.png.")
]
CountOption = Annotated[int | None, typer.Option(help="How many images to generate (shapes only).")]
WorkersOption = Annotated[int | None, typer.Option(help="Threads that decode; one per core when absent.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder with torchvision's files of cifar10, cifar100, stl10.")]
DownloadOption = Annotated[bool, typer.Option(help="Download a known data set that is absent.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]


def print_result(record: dict[str, Any], text: str, as_json: bool) -> None:
    print(json_text(record) if as_json else text)
