"""Recipes from YAML, dictionaries and `-s section.key=value`; every problem reported at once, in words."""

import difflib
import importlib.resources
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastssl.errors import UserError, errors_of, raise_all
from fastssl.recipe import progressive
from fastssl.recipe.presets import ViewTableError, view_table
from fastssl.recipe.schema import MAX_VIEWS, Augment, Model, Progressive, Recipe, Train, ViewSpec, loss_sections

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
# Keys of recipes written for 0.1, and what they are called now.
RENAMED = {
    "augment.applier": "augment.backend",
    "loss.orthogonality": "redundancy_weight (Barlow Twins), or invariance_weight and variance_weight (VICReg)",
    "loss.standardise": "loss.standardize",
    "loss.l2_normalise": "loss.l2_normalize",
}
# What a field takes, by the kind of Pydantic's error, where its own words are a programmer's.
KINDS = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a mapping: write -s {field}.{key}=VALUE"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list: write -s '{field}=[VALUE, VALUE]'"),
    "path_type": "a path",
}


def load(
    recipe: "Recipe | Mapping[str, Any] | str | Path", overrides: Iterable[str] = (), *, each_alone: bool = False
) -> Recipe:
    """A validated recipe.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file (a shipped recipe's name works from any folder).
        overrides: texts of the form "section.key=value", the value being YAML.
        each_alone: do not ask whether the fields go together.

    Raises:
        UserError: naming every problem at once.
    """
    origin = "the recipe"
    if isinstance(recipe, Recipe):
        tree: Any = recipe.model_dump(mode="json")
    elif isinstance(recipe, Mapping):
        tree = {**recipe}
    elif not isinstance(recipe, str | Path):
        raise UserError(
            f"recipe is {recipe!r}, a {type(recipe).__name__}.",
            "Pass a Recipe, a mapping, the path of a YAML file, or a shipped recipe's name.",
        )
    else:
        path = find(Path(recipe))
        origin, tree = str(recipe), parse(path)
        if isinstance(tree, dict):
            tree.setdefault("name", path.stem)
    if not isinstance(tree, dict):
        raise UserError(
            f"{origin} is not a recipe: its top level is not a mapping of sections.",
            "Start from `fastssl recipes`.",
        )
    errors = list[UserError]()
    for override in overrides:
        try:
            tree = apply_override(tree, override)
        except UserError as error:
            errors.append(error)
    if errors:
        raise_all([*errors, *errors_of(lambda: validate(tree, origin, each_alone=each_alone))])
    return validate(tree, origin, each_alone=each_alone)


def find(path: Path) -> Path:
    """The file itself, else the shipped recipe that NAME or recipes/NAME means."""
    if path.is_file():
        return path
    named = {p.name: p for p in shipped()}
    is_name = path.parent in (Path(), Path("recipes"))
    recipe_path = (named.get(path.name) or named.get(path.name + ".yaml")) if is_name else None
    if recipe_path is None:
        near = difflib.get_close_matches(path.stem, [p.removesuffix(".yaml") for p in named], n=1)
        hint = (
            f"Did you mean recipes/{near[0]}.yaml?"
            if near
            else "Give a YAML file, or one of: " + ", ".join(sorted(named)) + "."
        )
        raise UserError(f"There is no recipe {path}.", hint)
    return recipe_path


def shipped() -> list[Path]:
    """The recipes that come with fastssl, from the installed package or from the repository."""
    package = Path(str(importlib.resources.files("fastssl")))
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []


def parse(path: Path) -> Any:
    """YAML to plain Python, with limits: size, depth, and no aliases (a small file must not grow into a large tree)."""
    fix = "Write `section:` lines with indented `key: value` lines; `fastssl recipes` lists examples."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes, too large for a recipe.", fix)
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} is nested more than {MAX_DEPTH} deep or uses YAML aliases.", fix)
        twice = given_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        if twice:
            raise UserError(f"{path}: {'; '.join(twice)}.", "Leave one of them.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path} is not YAML{line}.", fix) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Give a readable recipe file.") from error


def given_twice(node: yaml.Node | None, section: str = "") -> list[str]:
    """The keys that a mapping has more than once, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        return [text for value in node.value for text in given_twice(value, section)]
    if not isinstance(node, yaml.MappingNode):
        return []
    seen, found = set[str](), list[str]()
    for key, value in node.value:
        name = f"{section}{key.value}"
        if name in seen:
            found.append(f"{name} is given twice (line {key.start_mark.line + 1})")
        seen.add(name)
        found += given_twice(value, f"{name}.")
    return found


def apply_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of the tree with one "section.key=value" set."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"-s {override!r} is not of the form section.key=value.",
            "Write for example -s data.batch_size=128.",
        )
    try:
        twice = given_twice(yaml.compose(text, Loader=yaml.SafeLoader), f"{key.strip()}.")
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"-s {override!r}: the value is not YAML.", "Quote it, for example -s 'augment.all={hflip_p: 0}'."
        ) from error
    if twice:
        raise UserError(f"-s {override!r}: {'; '.join(twice)}.", "Leave one of them.")
    *sections, last = key.strip().split(".")
    result = node = dict(tree)
    for section in sections:
        child = node.get(section)
        node[section] = dict(child) if isinstance(child, dict) else {}
        node = node[section]
    node[last] = value
    return result


def validate(tree: dict[str, Any], origin: str, *, each_alone: bool = False) -> Recipe:
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree)
        view_table(recipe.augment)
        problems = [] if each_alone else disagreements(recipe)
    except ValidationError as error:
        problems = [sentence(e["loc"], e) for e in error.errors()] + view_problems(tree)
    except ViewTableError:
        problems = view_problems(tree)
    except RecursionError:
        problems = ["nested too deep"]
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{origin} has {count}: " + "; ".join(problems) + ".",
            "Correct the fields named, in the file or with -s section.key=value.",
        )
    assert recipe is not None
    return recipe


def view_problems(tree: dict[str, Any]) -> list[str]:
    """What is wrong with the rows of a view table, where its other fields are right."""
    try:
        view_table(Augment.model_validate(tree.get("augment") or {}))
    except ViewTableError as error:
        return sorted({sentence(place, e) for place, e in error.problems})
    except (ValidationError, RecursionError):
        pass  # named with the other fields
    return []


def disagreements(recipe: Recipe) -> list[str]:
    """Problems that need more than one field to see."""
    problems = list[str]()
    data, augment, optim = recipe.data, recipe.augment, recipe.optim
    if augment.rows is not None and len(augment.rows) < 2:
        problems.append("augment.rows has fewer than 2 views; the losses compare views, so write at least two")
    elif augment.rows is not None and len(augment.rows) > MAX_VIEWS:
        problems.append(f"augment.rows has {len(augment.rows)} views, and {MAX_VIEWS} are the most")
    else:
        problems += progressive.disagreements(augment, recipe.train.epochs)
    part, rest = divmod(data.batch_size, optim.accumulate_steps)
    if rest or part < 2:
        problems.append(
            f"data.batch_size {data.batch_size} does not divide into optim.accumulate_steps {optim.accumulate_steps} "
            "parts of 2 or more images"
        )
    problems += group_problems(recipe.model, images=part)
    if optim.warmup_epochs > recipe.train.epochs:
        problems.append(
            f"optim.warmup_epochs {optim.warmup_epochs:g} is longer than train.epochs {recipe.train.epochs}"
        )
    if isinstance(recipe.train.compile, str) and optim.accumulate_steps > 1:
        problems.append(
            f"train.compile {recipe.train.compile} replays graphs whose gradients the next part would overwrite, so it "
            f"does not go with optim.accumulate_steps {optim.accumulate_steps}; set train.compile to true"
        )
    return problems + graph_problems(recipe.train)


def graph_problems(train: Train) -> list[str]:
    """What one graph of a whole step cannot hold."""
    if not train.cuda_graph:
        return []
    obstacles = {
        f"train.compile {train.compile} replays graphs of its own": isinstance(train.compile, str),
        "train.on_nonfinite skip looks at every gradient on the host": train.on_nonfinite == "skip",
        "train.precision fp16 looks at every gradient on the host": train.precision == "fp16",
    }
    return [f"{reason}, so it does not go with train.cuda_graph" for reason, is_so in obstacles.items() if is_so]


def group_problems(model: Model, *, images: int) -> list[str]:
    """What hinders groups of images with batch statistics of their own."""
    groups = model.batch_norm_groups
    if groups > 1 and model.batch_norm == "joint":
        return [f"model.batch_norm_groups {groups} needs model.batch_norm per_view"]
    if 2 * groups > images:
        return [f"model.batch_norm_groups {groups} leaves fewer than 2 of {images} images to a group"]
    return []


def sentence(place: tuple[Any, ...], error: Any) -> str:
    """One problem in words: the field's name first."""
    losses = loss_sections()
    tag = str(place[1]) if len(place) > 1 and place[0] == "loss" and place[1] in losses else None
    parts = [str(p) for i, p in enumerate(place) if not (i == 1 and tag)]
    field = ".".join(parts) or "the recipe"
    match error["type"]:
        case "extra_forbidden" if field in RENAMED:
            return f"{field} is now called {RENAMED[field]}"
        case "extra_forbidden" if len(parts) == 1:
            near = nearest_keys(field)
            return f"{field} is unknown" + (f" (did you mean {' or '.join(near)}?)" if near else "")
        case "extra_forbidden" if tag and parts[-1] not in losses[tag].model_fields:
            return f"{field} {unknown_to_loss(parts[-1], tag)}"
        case "extra_forbidden":
            near = difflib.get_close_matches(parts[-1], known_keys(parts[:-1]), n=1, cutoff=0.5)
            return f"{field} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
        case "union_tag_invalid":
            return f"{field}.name is unknown: choose {' or '.join(loss_sections())}"
        case "missing":
            return f"{field} is missing"
        case "value_error":
            return f"{field}: {error['msg'].removeprefix('Value error, ')}"
        case kind if kind in KINDS:
            key = "name" if field in ("loss", "optim") else "KEY"
            return f"{field} is {short(error.get('input'))}, not {KINDS[kind].format(field=field, key=key)}"
        case _:
            return f"{field} is {short(error.get('input'))}: {error['msg'][0].lower()}{error['msg'][1:]}"


def unknown_to_loss(key: str, name: str) -> str:
    """What is wrong with a key that the loss of this name lacks: it is another's, or misspelled."""
    losses = loss_sections()
    owners = [other for other, section in losses.items() if key in section.model_fields]
    if owners:
        return f"is a key of {' and '.join(owners)}, not of {name}; begin the section anew: -s 'loss={{name: {name}}}'"
    near = difflib.get_close_matches(key, losses[name].model_fields, n=1, cutoff=0.5)
    return "is unknown" + (f" (did you mean {near[0]}?)" if near else "")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(sections: list[str]) -> list[str]:
    """The keys allowed at a place of the recipe."""
    if sections == ["augment", "progressive"]:
        return list(Progressive.model_fields)
    if sections and sections[0] == "augment" and len(sections) > 1:
        return list(ViewSpec.model_fields)
    if sections == ["loss"]:  # of every loss
        return sorted({key for section in loss_sections().values() for key in section.model_fields})
    model: Any = Recipe
    for section in sections:
        field = model.model_fields.get(section) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = field.annotation if field else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def nearest_keys(key: str) -> list[str]:
    """The dotted keys that a key without its section may mean: those that end in it, else the one most like it."""
    dotted = {f"{section}.{name}": name for section in Recipe.model_fields for name in known_keys([section])}
    exact = [place for place, name in dotted.items() if name == key]
    sections = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.7)
    names = difflib.get_close_matches(key, dotted.values(), n=1, cutoff=0.7)
    return exact or sections or [place for place, name in dotted.items() if name in names]


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that loads to an equal recipe."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def header(path: Path) -> str:
    """The comment lines at the top of a recipe, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in top)
