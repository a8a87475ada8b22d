"""The typer application, the options that verbs share, and how a verb prints its result."""

import json
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pretrain a vision backbone on unlabelled images as fast as the hardware allows.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")]
SetOption = Annotated[
    list[str] | None, typer.Option("-s", "--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]


def print_result(record: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(record) if as_json else text)
