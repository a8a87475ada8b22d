"""What a person may say about a source that can be read in more than one way."""

import dataclasses
from pathlib import Path

from fastssl.errors import option


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """None leaves the choice to the names that are in common use.

    Attributes:
        image_column, label_column: of a table (.csv, .parquet, Arrow).
        image_root: folder that a .csv's paths start from; its own folder when None.
        image_key: suffix of the image in a WebDataset sample that holds several, such as "jpg" or "left.png".
        classes: class names, where they are known; a single folder of such a name is a class.
    """

    image_column: str | None = None
    label_column: str | None = None
    image_root: Path | None = None
    image_key: str | None = None
    classes: tuple[str, ...] = ()


def choice(name: str, value: object = None) -> str:
    """One of the above as an option, with the verb to give it to: others that read sources lack it."""
    return f"{option(name, value)} of `convert`"
