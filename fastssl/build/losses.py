"""The recipe's loss: the one table of losses, and what it says of a recipe's weights."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastssl.build import ranks
from fastssl.losses.barlow_twins import LOSS as BARLOW_TWINS
from fastssl.losses.loss import Loss, Terms
from fastssl.losses.sigreg import LOSS as SIGREG
from fastssl.losses.vicreg import LOSS as VICREG
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import Recipe

LOSSES: dict[str, Loss] = {row.name: row for row in (BARLOW_TWINS, VICREG, SIGREG)}


def loss(recipe: Recipe) -> Callable[..., Terms]:
    """The recipe's loss of embeddings with its settings, and its sums over ranks; where `seeds`, with a `seed`."""
    sums = {"all_sum": ranks.all_sum} if ranks.world() > 1 else {}
    return partial(LOSSES[recipe.loss.name].function, **settings(recipe), **sums)


def seeds(recipe: Recipe) -> Callable[[int], int] | None:
    """The number of a step to the loss's seed, where the loss draws at random."""
    return partial(seed_of_step, recipe.seed) if LOSSES[recipe.loss.name].is_seeded else None


def seed_of_step(seed: int, step: int) -> int:
    """A number of 32 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest())


def settings(recipe: Recipe) -> dict[str, Any]:
    """The loss's section of the recipe without its name."""
    return recipe.loss.model_dump(exclude={"name"})


def weights(recipe: Recipe, dim: int) -> dict[str, float]:
    """The loss's weights as numbers, for embeddings of D = dim."""
    return LOSSES[recipe.loss.name].weights(dim, len(view_table(recipe.augment)), **settings(recipe))


def collapse_risk(recipe: Recipe) -> str | None:
    """One sentence when the recipe's weights are far from the rule's for its D, else None."""
    if not recipe.model.projector:
        return None  # D is the backbone's
    dim = recipe.model.projector[-1]
    return LOSSES[recipe.loss.name].collapse_risk(dim, len(view_table(recipe.augment)), **settings(recipe))


def terms_in(record: Mapping[str, Any]) -> dict[str, float]:
    """The terms of any loss of the table that a record holds, in the order in which the loss names them."""
    names = dict.fromkeys(name for row in LOSSES.values() for name in row.terms)
    return {name: record[name] for name in names if name in record}
