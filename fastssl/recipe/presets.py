"""Named view tables.

Sources: arXiv 2312.10725 (CIFAR-10, STL-10), Zbontar et al. 2021 and Bardes et al. 2022 (the asymmetric ImageNet pair),
Caron et al. 2020 (multi-crop).
"""

from typing import Any

from pydantic import ValidationError

from fastssl.recipe.schema import Augment, ViewSpec

CIFAR = {
    "crop": "random_resized", "hflip_p": 0.5, "jitter_p": 0.8,
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "gray_p": 0.2,
}  # fmt: skip
STL = CIFAR | {"area_min": 0.2, "gray_p": 0.1}
IMAGENET = CIFAR | {
    "saturation": 0.2,
    "hue": 0.1,
    "interpolation": "bicubic",
    "blur_p": 0.5,
    "solarize_p": 0.1,
}
PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": ({},),
    "cifar": (CIFAR,),
    "stl": (STL,),
    "imagenet": (IMAGENET,),
    "imagenet_asymmetric": (
        IMAGENET | {"blur_p": 1.0, "solarize_p": 0.0},
        IMAGENET | {"blur_p": 0.1, "solarize_p": 0.2},
    ),
    "multicrop": (IMAGENET | {"area_min": 0.14},),
}


def view_table(augment: Augment) -> tuple[ViewSpec, ...]:
    """The recipe's V rows, large views first. Raises ValueError naming each field that is wrong."""
    changes = augment.rows if augment.rows is not None else ({},) * augment.views
    pattern = PRESETS[augment.preset]
    rows, problems = [], []
    for i, change in enumerate(changes):
        base = {"side_px": augment.side_px} | pattern[i % len(pattern)]
        if augment.preset == "multicrop" and i >= 2:
            base |= {
                "side_px": augment.small_side_px or max(4, augment.side_px * 3 // 7),
                "area_min": 0.05,
                "area_max": 0.14,
            }
        try:
            rows.append(ViewSpec(**(base | augment.all | change)))
        except ValidationError as error:
            problems += [(("augment", section_of(e["loc"], change), *e["loc"]), e) for e in error.errors()]
    if problems:
        raise ViewTableError(problems)
    return tuple(rows)


def section_of(place: tuple[Any, ...], change: dict[str, Any]) -> str:
    """Where a wrong field was written; what says no field is wrong with a row as a whole."""
    of_row = bool(change) if not place else place[0] in change
    return "rows" if of_row else "all"


def views_text(augment: Augment) -> str:
    """One line per view: side, crop, and what the row changes."""
    plain = ViewSpec().model_dump()
    lines = []
    for i, row in enumerate(view_table(augment), start=1):
        changed = {k: v for k, v in row.model_dump().items() if k in ("side_px", "crop") or v != plain[k]}
        lines.append(f"view {i}: " + ", ".join(f"{key} {value}" for key, value in changed.items()))
    return "\n".join(lines)


class ViewTableError(ValueError):
    """Errors of pydantic's form, each with the field's place in the recipe."""

    def __init__(self, problems: list[tuple[tuple[Any, ...], Any]]) -> None:
        super().__init__("view table")
        self.problems = problems
