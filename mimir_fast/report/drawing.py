"""Matplotlib's Figure, whatever the environment says about windows: figures are drawn into files."""

import os

try:
    from matplotlib.figure import Figure
except ValueError:
    # MPLBACKEND names a backend that this matplotlib does not know, a notebook's for example, and Matplotlib then refuses to be
    # imported at all.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

__all__ = ["Figure"]
