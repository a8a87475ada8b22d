"""fastssl: pretrain a vision backbone on unlabelled images as fast as the hardware allows."""

__version__ = "0.1.0"
