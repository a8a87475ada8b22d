"""Conversion: from any source of images to one `.beton` file or WebDataset shards."""
