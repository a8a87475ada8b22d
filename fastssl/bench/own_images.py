"""From images to a recipe that trains on them: what `fastssl train my_photos/` does before it trains."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastssl.bench.new_recipe import write_new
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source

SIDE_PX = 64  # of the squares that images become: what a CPU trains on in minutes
DATA_SUFFIXES = (".tar", ".gz", ".tgz", ".xz", ".bz2", ".zip", ".csv", ".tsv", ".parquet", ".npy", ".npz", ".beton")
ConvertProgress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Plan:
    """What will be made of a source of images.

    Attributes:
        source: a folder, an archive, or any other source that `convert` reads.
        data: the .beton file, made unless it is there.
        recipe: the YAML file, written unless it is there.
    """

    source: Path
    data: Path
    recipe: Path

    def text(self) -> str:
        """The steps, for a person, before they are taken."""
        reuse = "use {path}, which is there already"
        convert_it = f"convert it to {self.data} ({SIDE_PX} px squares)"
        write_it = f"write {self.recipe}, a commented recipe for these images and this machine"
        steps = [
            reuse.format(path=self.data) if self.data.exists() else convert_it,
            reuse.format(path=self.recipe) if self.recipe.exists() else write_it,
            f"train it into runs/{self.recipe.stem}",
        ]
        numbered = "\n".join(f"  {i}. {step}" for i, step in enumerate(steps, start=1))
        return (
            f"{self.source} holds images, not a recipe. This command will\n{numbered}\n"
            f"To change anything, edit {self.recipe} and run: fastssl train {self.recipe}"
        )


def plan_of(source: str) -> Plan | None:
    """The plan for a folder or file of images; None for a recipe, a run, or a name that is no path."""
    path = Path(source)
    is_images = path.is_dir() and not (path / "recipe.yaml").exists()
    if not (is_images or (path.is_file() and path.suffix.lower() in DATA_SUFFIXES)):
        return None
    name = re.sub(r"[^\w-]+", "_", path.resolve().name.split(".")[0]).strip("_") or "images"
    data = path if path.suffix == ".beton" else Path("data") / f"{name}.beton"
    return Plan(path, data, Path(f"{name}.yaml"))


def carry_out(plan: Plan, progress: ConvertProgress | None = None) -> Path:
    """Makes what is missing of the plan's files and returns the recipe's path.

    Raises:
        UserError: as `convert` and `new_recipe` do.
    """
    if not plan.data.exists():
        open_source(str(plan.source))  # refuses what holds no images before a folder is made for them
        plan.data.parent.mkdir(parents=True, exist_ok=True)
        convert(str(plan.source), plan.data, side_px=SIDE_PX, progress=progress_of(plan, progress))
    if not plan.recipe.exists():
        write_new(plan.data, plan.recipe)
    return plan.recipe


def progress_of(plan: Plan, progress: ConvertProgress | None) -> Callable[[int, int | None], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(str(plan.data), done, total)
