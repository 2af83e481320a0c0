"""Matplotlib's Figure, whatever the environment says about windows: figures are drawn into files."""

import contextlib
import os
import sys

# Matplotlib refuses to be imported where MPLBACKEND names a backend that it does not know, and cannot be imported again then.
_imported, _backend = "matplotlib" in sys.modules, os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.figure import Figure
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None and not _imported:
    # For whoever draws into windows or notebooks in this process.
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

__all__ = ["Figure"]
