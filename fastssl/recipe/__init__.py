"""A run described in full: typed, frozen, validated at once, every default in one place."""

from fastssl.recipe.load import dump, header, load, shipped
from fastssl.recipe.presets import view_table
from fastssl.recipe.schema import BarlowTwins, Recipe, VicReg, ViewSpec

__all__ = ["BarlowTwins", "Recipe", "VicReg", "ViewSpec", "dump", "header", "load", "shipped", "view_table"]
