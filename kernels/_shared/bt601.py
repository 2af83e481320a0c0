"""Colours as luma and chroma: the constants of ITU-R BT.601 in the full range 0..255, as JPEG has them."""

# What red and blue contribute to luma; green has the rest.
RED, BLUE = 0.299, 0.114
GREEN = 1 - RED - BLUE
# Chroma is (blue - luma) / CB and (red - luma) / CR around GREY.
CB, CR = 2 * (1 - BLUE), 2 * (1 - RED)
GREY = 128.0
