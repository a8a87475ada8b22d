"""`fastssl recipe`: a recipe with every default, a new one for given images, the schema that editors read."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastssl.cli.app import JsonOption, SetOption, app, print_result
from fastssl.cli.stopped import command

recipe = typer.Typer(no_args_is_help=True, help="Show a recipe in full, write a new one, or print the recipes' schema.")
app.add_typer(recipe, name="recipe")


@recipe.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A shipped recipe's name, a YAML file, or a run.")],
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a recipe with every default, and the views it stands for."""
    from fastssl.recipe.load import dump, find, header, load
    from fastssl.recipe.presets import view_table, views_text

    path = Path(name) / "recipe.yaml" if (Path(name) / "recipe.yaml").is_file() else find(Path(name))
    resolved = load(path, changes or ())
    comments = [*header(path).splitlines(), *views_text(resolved.augment).splitlines()]
    views = [row.model_dump(mode="json") for row in view_table(resolved.augment)]
    text = "\n".join([*(f"# {line}".rstrip() for line in comments), dump(resolved).rstrip()])
    print_result({"recipe": resolved.model_dump(mode="json"), "views": views}, text, as_json)


@recipe.command()
def new(
    data: Annotated[Path, typer.Argument(help="The .beton file that `fastssl convert` wrote.")],
    out: Annotated[Path, typer.Option(help="The recipe to write, for example my.yaml.")],
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="What this machine has, when absent.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of training, to choose epochs by; 10 on a CPU, 60 on a GPU when absent.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Such as resnet18, torchvision/NAME or timm/NAME; chosen for speed when absent.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for a data file and a device, and the schema that editors check it by."""
    from fastssl.bench.new_recipe import write_new

    record = write_new(data, out, device=device, minutes=minutes, backbone=backbone)
    epochs = "1 epoch" if record["epochs"] == 1 else f"{record['epochs']} epochs"
    hub = [] if record["hub"] else [f"Not for torchvision or timm: {record['backbone']} is fastssl's own network."]
    lines = [
        f"{out}: {record['backbone']}, {epochs}.",
        f"{record['schema']}: the schema that editors check recipes by.",
        *hub,
        *(["For those, set model.backbone to resnet18, or give --backbone resnet18; it is slower."] if hub else []),
        f"See it: {command('train', out, '--dry-run')}",
        f"Train: {command('train', out)}",
    ]
    print_result(record, "\n".join(lines), as_json)


@recipe.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file, too.")] = None, as_json: JsonOption = False
) -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML by one."""
    import json

    from fastssl.recipe.json_schema import json_schema

    document = json_schema()
    if out is not None:
        from fastssl.errors import UserError
        from fastssl.runs.files import atomic_json

        if out.suffix != ".json":
            raise UserError(f"--out is {out}.", "Give it the suffix .json.")
        atomic_json(out, document)
    print_result(document, json.dumps(document, indent=1), as_json)
