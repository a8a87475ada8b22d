"""What a run computes its matrix products in, chosen once: a resume on another machine keeps it."""

from pathlib import Path

from fastssl import build
from fastssl.recipe.load import load
from fastssl.recipe.schema import Recipe
from fastssl.runs.directory import JUDGED_ANYHOW


def choose(recipe: Recipe, folder: Path) -> tuple[Recipe, str]:
    """The recipe with a precision in place of auto, and one phrase that says which and why.

    Args:
        recipe: asks for one, or for auto.
        folder: of the run; one that has begun keeps its precision.
    """
    if recipe.train.precision != "auto":
        return recipe, f"{recipe.train.precision}: train.precision"
    name, reason = build.hardware.precision(recipe), "as the run began"
    written = folder / "recipe.yaml"
    before = load(written).train.precision if written.exists() else "auto"
    if before != "auto":
        name = before
    else:
        has = "has" if name == "bf16" else "has no"
        reason = f"{build.hardware.device(recipe).type} {has} instructions for bfloat16"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": name})}), f"{name}: {reason}"


def holds_another(folder: Path, recipe: Recipe) -> bool:
    """Whether a run of another recipe has begun in a folder; a precision of auto stands for that of the run."""
    written = folder / "recipe.yaml"
    if not written.exists():
        return False
    before, now = (
        of.model_dump(exclude={"evaluate": JUDGED_ANYHOW}) for of in (load(written), choose(recipe, folder)[0])
    )
    return before != now
