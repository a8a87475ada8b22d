"""Where the data files of a run are: as its recipe says, else where they were when it trained; what to do when not.

data.json of a run holds of each file the path as given, the absolute one, and the digest. The digest decides: a file
at the absolute path is taken only when it is the one that the run was trained on.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastssl.data.manifest import read_manifest
from fastssl.errors import PlaceWarning, UserError, option
from fastssl.recipe.load import find
from fastssl.recipe.load import load as load_recipe
from fastssl.recipe.schema import Recipe
from fastssl.runs.directory import DATA_FILES

Place = Mapping[str, Any]  # "given", "absolute", and "digest", which is None without a manifest


def places(given: Recipe, here: Recipe) -> dict[str, Place]:
    """For data.json, by field of the recipe's `data`.

    Args:
        given: the recipe with the paths as they were written.
        here: the same with those that were opened.
    """
    opened = {field: getattr(here.data, field) for field in DATA_FILES}
    return {
        field: {
            "given": str(getattr(given.data, field)),
            "absolute": os.path.abspath(path),
            "digest": digest_of(path),
        }
        for field, path in opened.items()
        if path is not None
    }


def recorded(run_dir: Path | None) -> dict[str, Place]:
    """What `places` left in a run; empty for no run, or one that has not recorded it."""
    try:
        record = json.loads((run_dir / "data.json").read_bytes())["files"] if run_dir else {}
        return {
            field: record[field] for field in DATA_FILES if field in record and os.fspath(record[field]["absolute"])
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def digest_of(path: Path) -> str | None:
    try:
        return read_manifest(path).digest
    except (OSError, ValueError):
        return None


def is_same_file(path: Path, place: Place) -> bool:
    """Whether the file is there and, as far as digests tell, is the one that the run was trained on."""
    return path.exists() and place.get("digest") in (None, digest_of(path))


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A validated recipe; one that lies in a run, with the paths at which the run's data files are now.

    Args:
        recipe: the path of a YAML file, or a shipped recipe's name.
        overrides: texts of the form "section.key=value".

    Raises:
        UserError: naming every problem at once.

    Warns:
        PlaceWarning: where a path is another than the recipe's.
    """
    written = load_recipe(recipe, overrides)
    here = located(written, find(Path(recipe)).parent)
    for field in DATA_FILES:
        before, now = getattr(written.data, field), getattr(here.data, field)
        if now != before:
            warnings.warn(f"data.{field} {before} is {now}, as when the run trained.", PlaceWarning, stacklevel=2)
    return here


def located(recipe: Recipe, run_dir: Path | None) -> Recipe:
    """A run's recipe with the paths at which its data files are now.

    A path as the run was given it that does not lead to its file from here becomes the absolute one, if that does.
    """
    changes = dict[str, Path]()
    for field, place in recorded(run_dir).items():
        path, before = getattr(recipe.data, field), Path(place["absolute"])
        as_given = path is not None and str(path) == place.get("given")
        if as_given and not is_same_file(path, place) and is_same_file(before, place):
            changes[field] = before
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)}) if changes else recipe


def resumed(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe of a run that trains on, as `located` makes it.

    Raises:
        UserError: when a file is nowhere and nothing is known to make it from, or is not the run's.
    """
    here = located(recipe, run_dir)
    for field, place in recorded(run_dir).items():
        path = getattr(here.data, field)
        if path is None:
            continue
        if not path.exists() and here.data.source is None:
            raise moved(here, field, run_dir)
        if path.exists() and not is_same_file(path, place):
            raise changed(path, str(place["digest"]), str(digest_of(path)))
    return here


def moved(recipe: Recipe, field: str, run_dir: Path) -> UserError:
    """What every verb says of a run's data file that is neither where its recipe says nor where it was."""
    path = getattr(recipe.data, field)
    before = recorded(run_dir).get(field, {}).get("absolute", os.path.abspath(path))
    return UserError(
        f"{path} does not exist; {run_dir} was trained with {before}.",
        f"Put it back, or write where it is now as data.{field} into {run_dir / 'recipe.yaml'}; for training, into the "
        "recipe that you train with.",
    )


def changed(path: Path, before: str, now: str) -> UserError:
    """What is said of a data file that is another than the run began with."""
    return UserError(
        f"{path} has changed: its digest was {before} and is {now}.",
        f"Put the earlier file back, or start a new run with another {option('run_dir')}.",
    )


def made_otherwise(recipe: Recipe) -> list[str]:
    """A sentence for each file that was there already, and made from another source or in another way than asked."""
    data, said = recipe.data, list[str]()
    if data.source is None:
        return said
    for path, split, count in (
        (data.path, data.split, data.count),
        (data.probe_path, data.probe_split, data.count),
        (data.test_path, data.test_split, data.test_count),
    ):
        if path is None:
            continue
        made = read_manifest(path).options
        wanted = {"source": data.source, "split": split, "side_px": data.side_px, "count": count}
        other = [key for key, value in wanted.items() if value is not None and key in made and made[key] != value]
        if "source" in other and Path(str(made["source"])).resolve() == Path(data.source).resolve():
            other.remove("source")
        if other:
            was, asked = (", ".join(f"{key} {of[key]}" for key in other) for of in (made, wanted))
            said.append(f"{path} was made with {was}, and the recipe says {asked}: it is used as it is.")
    return said
