"""A run described in full: typed, frozen, validated at once, every default in one place."""

from fastssl.recipe.load import dump, find, header, load, shipped
from fastssl.recipe.presets import view_table, views_text
from fastssl.recipe.schema import BarlowTwins, Recipe, VicReg, ViewSpec

__all__ = [
    "BarlowTwins",
    "Recipe",
    "VicReg",
    "ViewSpec",
    "dump",
    "find",
    "header",
    "load",
    "shipped",
    "view_table",
    "views_text",
]
