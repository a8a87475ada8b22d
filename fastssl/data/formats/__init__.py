"""Readers of image files: JPEG by libjpeg-turbo, TIFF with many bands by tifffile, the rest by Pillow."""
