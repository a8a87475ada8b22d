"""Numbers of color standards that all three backends compute with."""

RGB = 3  # color operations apply to so many channels only
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's rounding of ITU-R 601-2
# the NTSC matrices as printed, each rounded for itself: their product is the identity to three digits only
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
YIQ_TO_RGB = ((1.0, 0.956, 0.621), (1.0, -0.272, -0.647), (1.0, -1.106, 1.703))
