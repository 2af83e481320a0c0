"""`compat`: whether a model computes what the original does where that differs from the default, the corrected form."""

from mimir_fast.config.choices import ORIGINAL


def checked(compat: str | None) -> str | None:
    """The keyword as it is.  Raises ValueError for another value than None and "original"."""
    if compat not in (None, ORIGINAL):
        raise ValueError(f"compat: expected None or {ORIGINAL!r}, got {compat!r}")
    return compat
