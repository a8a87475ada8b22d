"""`fastssl recipes`: list the shipped recipes."""

from fastssl.cli.app import JsonOption, app, print_result


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes with their headers."""
    from fastssl.recipe.load import header, shipped

    headers = {path.name: header(path) for path in shipped()}
    print_result({"recipes": headers}, "\n\n".join(f"{name}\n{text}" for name, text in headers.items()), as_json)
