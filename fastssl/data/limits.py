"""The largest images that a data file may hold."""

MAX_SIDE_PX = 65535  # 16 bits of a .beton's record
MAX_CHANNELS = 1024
