"""FFCV's `.beton` format, read and written with numpy alone."""
