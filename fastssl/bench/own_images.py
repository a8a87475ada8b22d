"""From images to a recipe that trains on them: what `fastssl train my_photos/` does before it trains."""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastssl import build
from fastssl.bench.new_recipe import TEMPLATES, Device, write_new
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.errors import UserError
from fastssl.recipe.load import apply_override, load

SIDE_PX = 64  # of the squares that images become: what a CPU trains on in minutes
OF_CONVERSION = ("side_px", "split", "on_error", "workers")  # fields of `data` that decide how images are converted
DATA_SUFFIXES = (".tar", ".gz", ".tgz", ".xz", ".bz2", ".zip", ".csv", ".tsv", ".parquet", ".npy", ".npz", ".beton")
ConvertProgress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Plan:
    """What will be made of a source of images.

    Attributes:
        source: a folder, an archive, or any other source that `convert` reads.
        data: the .beton file, made unless it is there.
        recipe: the YAML file, written unless it is there.
        options: arguments of `convert`.
    """

    source: Path
    data: Path
    recipe: Path
    options: Mapping[str, Any]

    def text(self) -> str:
        """The steps, for a person, before they are taken."""
        reuse = "use {}, which is there already"
        count = f" ({build.data.manifest_of(self.data).count:,} images)" if self.data.exists() else ""
        side_px = self.options["side_px"]
        shape = "sizes kept" if side_px is None else f"{side_px} px squares"
        convert_it = f"convert it to {self.data} ({shape})"
        write_it = f"write {self.recipe}, a commented recipe for these images and this machine"
        steps = [
            reuse.format(self.data) + count if self.data.exists() else convert_it,
            reuse.format(self.recipe) if self.recipe.exists() else write_it,
            f"train it into runs/{self.recipe.stem}",
        ]
        numbered = "\n".join(f"  {i}. {step}" for i, step in enumerate(steps, start=1))
        return (
            f"{self.source} holds images, not a recipe. This command will\n{numbered}\n"
            f"To change anything, edit {self.recipe} and run: fastssl train {self.recipe}"
        )


def plan_of(source: str, changes: Iterable[str] = ()) -> Plan | None:
    """The plan for a folder or file of images; None for a recipe, a run, or a name that is no path.

    Args:
        source: where the images are.
        changes: of the recipe, "section.key=value"; those of `data` that decide a conversion go into its options.

    Raises:
        UserError: when what is there under the plan's names belongs to other images or was made otherwise, and for
            changes that no recipe takes.
    """
    path = Path(source)
    is_images = path.is_dir() and not (path / "recipe.yaml").exists()
    if not (is_images or (path.is_file() and path.suffix.lower() in DATA_SUFFIXES)):
        return None
    name = name_of(path)
    data = path if path.suffix == ".beton" else Path("data") / f"{name}.beton"
    recipe = Path(f"{name}.yaml")
    given = data_changes(data, recipe, list(changes))
    plan = Plan(path, data, recipe, {"side_px": SIDE_PX, **given})
    check(plan, given)
    return plan


def data_changes(data: Path, recipe: Path, changes: list[str]) -> dict[str, Any]:
    """The fields of `data` among the changes that decide a conversion.

    Raises:
        UserError: for changes that no recipe takes, and for another `data.path` or `data.source`.
    """
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    written = recipe.exists()  # until it is, a shipped one stands for it: its sides and epochs will be others
    base = str(recipe) if written else TEMPLATES[device][0].recipe
    merged = load(base, [f"data.path={json.dumps(str(data))}", *changes], each_alone=not written).data
    tree: dict[str, Any] = {}
    for change in changes:
        tree = apply_override(tree, change)
    given = tree.get("data", {})
    for field in ("path", "source"):
        if field in given:
            raise UserError(
                f"-s data.{field} is given, and the images to train on are given in place of a recipe.",
                "Leave one of them out.",
            )
    fields = {field: getattr(merged, field) for field in OF_CONVERSION if field in given}
    return {**fields, "workers": fields.get("workers") or None}


def name_of(source: Path) -> str:
    """The source's name without the suffixes of data: photos_v1 of photos.v1.tar.gz."""
    bare = source.resolve()
    while bare.suffix.lower() in DATA_SUFFIXES:
        bare = bare.with_suffix("")
    return re.sub(r"[^\w-]+", "_", bare.name).strip("_-") or "images"


def check(plan: Plan, given: Mapping[str, Any]) -> None:
    """Refuses data or a recipe of the plan's names that belong to other images, or data made otherwise than asked."""
    if plan.data.exists():
        made = build.data.manifest_of(plan.data).options
        for field in ("side_px", "split"):
            if field in given and made.get(field) != given[field]:
                raise UserError(
                    f"{plan.data} is there already and was made with {field} {made.get(field)}, not {given[field]}.",
                    f"Leave -s data.{field} out, or move the file and {plan.recipe} away.",
                )
    if plan.data != plan.source and plan.data.exists():
        made_from = str(build.data.manifest_of(plan.data).options.get("source", "other images"))
        if Path(made_from).resolve() != plan.source.resolve():
            raise UserError(
                f"{plan.data} was made from {made_from}, not from {plan.source}.",
                f"Move it and {plan.recipe} away, or choose a name: `fastssl convert {shlex.quote(str(plan.source))} "
                f"data/OTHER.beton --side-px {SIDE_PX}`, then `fastssl train data/OTHER.beton`.",
            )
    if plan.recipe.exists():
        trains_on = load(plan.recipe).data.path
        if trains_on.resolve() != plan.data.resolve():
            raise UserError(
                f"{plan.recipe} trains on {trains_on}, not on {plan.data}.",
                f"Move it away, or use it as it is: `fastssl train {shlex.quote(str(plan.recipe))}`.",
            )


def carry_out(plan: Plan, progress: ConvertProgress | None = None) -> Path:
    """Makes what is missing of the plan's files and returns the recipe's path.

    Raises:
        UserError: as `convert` and `new_recipe` do.
    """
    if not plan.data.exists():
        open_source(
            str(plan.source), split=plan.options.get("split", "train")
        )  # refuses what holds no images before a folder is made for them
        plan.data.parent.mkdir(parents=True, exist_ok=True)
        convert(str(plan.source), plan.data, **plan.options, progress=progress_of(plan, progress))
    if not plan.recipe.exists():
        write_new(plan.data, plan.recipe)
    return plan.recipe


def progress_of(plan: Plan, progress: ConvertProgress | None) -> Callable[[int, int | None], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(str(plan.data), done, total)
