"""Settings of a recipe that others leave without effect: each is said when a run begins."""

from collections.abc import Mapping
from typing import Any

from fastssl.build import ranks
from fastssl.build.model import CUSTOM
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe, Section

OPTIMIZERS = {
    "momentum": ("sgd", "lars", "muon"),
    "betas": ("adam", "adamw", "muon"),
    "trust": ("lars",),
    "rate_in_momentum": ("lars",),
}


def idle_settings(recipe: Recipe) -> list[str]:
    """A sentence for each setting that another one leaves without effect.

    Settings at their default count as not made: a run's own recipe.yaml holds every one of them.
    """
    return [*idle_views(recipe), *idle_elsewhere(recipe)]


def idle_views(recipe: Recipe) -> list[str]:
    """Of the view table."""
    augment, said = recipe.augment, list[str]()
    if augment.rows is not None and augment.views not in (default_of(augment, "views"), len(augment.rows)):
        said.append(f"augment.views {augment.views} changes nothing: augment.rows has {len(augment.rows)} views.")
    if augment.small_side_px is not None and augment.preset != "multicrop":
        said.append(f"augment.small_side_px changes nothing with the preset {augment.preset}: set multicrop.")
    rows = view_table(augment)
    factors = ("brightness", "contrast", "saturation", "hue")
    cases: dict[str, list[Any]] = {
        "rotate_p changes nothing without rotate_max_deg.": [r.rotate_p and not r.rotate_max_deg for r in rows],
        "rotate_max_deg changes nothing without rotate_p.": [r.rotate_max_deg and not r.rotate_p for r in rows],
        "pad_px changes nothing without crop: pad.": [r.pad_px and r.crop != "pad" for r in rows],
        "crop: pad is a plain resize without pad_px.": [r.crop == "pad" and not r.pad_px for r in rows],
        f"jitter_p changes nothing without one of {', '.join(factors)}.": [
            r.jitter_p and not any(getattr(r, factor) for factor in factors) for r in rows
        ],
    }
    for sentence, is_so in cases.items():
        if any(is_so):
            said.append(f"In the view table {sentence}")
    return said


def idle_elsewhere(recipe: Recipe) -> list[str]:
    """Of every other section."""
    data, model, optim, train = recipe.data, recipe.model, recipe.optim, recipe.train
    said = [
        f"optim.{field} changes nothing with the optimizer {optim.name}: it is of {', '.join(of)}."
        for field, of in OPTIMIZERS.items()
        if optim.name not in of and getattr(optim, field) != default_of(optim, field)
    ]
    if optim.schedule == "constant" and optim.final_fraction != default_of(optim, "final_fraction"):
        said.append("optim.final_fraction changes nothing with the schedule constant.")
    if model.backbone == CUSTOM:
        own = [field for field in ("stem", "width") if getattr(model, field) != default_of(model, field)]
        said += [f"model.{field} changes nothing: the backbone is a module from Python." for field in own]
    if data.loader in ("ffcv", "dali") and data.memory != default_of(data, "memory"):
        said.append(f"data.memory {data.memory} changes nothing with data.loader {data.loader}: set resident or auto.")
    if ranks.world() == 1 and train.gradient_compression != default_of(train, "gradient_compression"):
        said.append(f"train.gradient_compression {train.gradient_compression} changes nothing in a single process.")
    if recipe.evaluate.baselines and data.test_path is None:
        said.append("evaluate.baselines changes nothing without data.test_path.")
    return said


def default_of(section: Section, field: str) -> Any:
    fields: Mapping[str, Any] = type(section).model_fields
    return fields[field].default
