"""The recipe's JSON schema, for editors that complete and check YAML by one (yaml-language-server and others).

It comes from the models themselves. What they say in code, beyond their types, is added: the rows of a view table, and
that a loss without a name is Barlow Twins. Checks over several fields stay with `load`.
"""

from typing import Any

from fastssl.recipe.schema import Recipe, ViewSpec, loss_sections

FILE_NAME = "recipe.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file as JSON values (JSON Schema 2020-12)."""
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    parts["ViewSpec"] = ViewSpec.model_json_schema()
    row = {"$ref": "#/$defs/ViewSpec"}
    augment = parts["Augment"]["properties"]
    augment["all"] = {**without(augment["all"], "additionalProperties", "type"), **row}
    augment["rows"]["anyOf"][0]["items"] = row
    for section in list(loss_sections().values())[1:]:
        parts[section.__name__]["required"] = ["name"]  # without a name it is Barlow Twins
    return {"$schema": DIALECT, **schema, "title": "A recipe of fastssl"}


def without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
