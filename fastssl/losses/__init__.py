"""Losses for any number of views, one file each, as pure functions of the embeddings (V, B, D)."""

from fastssl.losses.barlow_twins import barlow_twins
from fastssl.losses.sigreg import sigreg
from fastssl.losses.vicreg import vicreg

__all__ = ["barlow_twins", "sigreg", "vicreg"]
