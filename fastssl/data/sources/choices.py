"""What a person may say about a source that can be read in more than one way."""

import dataclasses
from pathlib import Path

from fastssl.errors import UserError, option


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

    def taken_by(self, kind: str, *names: str) -> "Choices":
        """These, for a reader that takes the named ones; class names suit every reader.

        Raises:
            UserError: for others that are given, which the reader would ignore.
        """
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        refuse_idle(kind, *(option(name) for name in given if name not in {*names, "classes"}))
        return self


def refuse_idle(kind: str, *options: str) -> None:
    """UserError where there are options that say nothing about this kind of source."""
    if options:
        it = "it" if len(options) == 1 else "them"
        raise UserError(f"{' and '.join(options)}: {kind} has no use for {it}.", f"Leave {it} out.")


def choice(name: str, value: object = None) -> str:
    """One of the above as an option, with the verb to give it to: others that read sources lack it."""
    return f"{option(name, value)} of `convert`"
