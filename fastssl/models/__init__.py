"""Backbones, by name or from torchvision and timm; projectors; starting weights and frozen stages."""
