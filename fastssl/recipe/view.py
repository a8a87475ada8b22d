"""A row of the view table as Python writes it: `fastssl.View(side_px=32, crop="random_resized", hflip_p=0.5)`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastssl.errors import UserError
from fastssl.recipe.schema import ViewSpec

Row = ViewSpec | Mapping[str, Any]


class View(ViewSpec):
    """One row of the view table. The defaults change nothing but the side length.

    Args:
        fields: those of `fastssl.recipe.schema.ViewSpec`.

    Raises:
        UserError: naming every field that is unknown or out of range.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'the row'}: {e['msg']}" for e in error.errors()]
            raise UserError(
                f"View({', '.join(fields)}) is refused: {'; '.join(problems)}.",
                f"Its fields are {', '.join(ViewSpec.model_fields)}.",
            ) from None


def row_of(row: Row) -> dict[str, Any]:
    """A row of the view table as a mapping.

    Raises:
        UserError: when it is none.
    """
    if isinstance(row, ViewSpec):
        return row.model_dump(mode="json")
    if isinstance(row, Mapping):
        return dict(row)
    raise UserError(f"A view is {row!r}.", 'Write fastssl.View(side_px=32, ...) or {"side_px": 32, ...} for each.')
