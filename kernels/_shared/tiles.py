"""Tile sizes that were chosen for this process, by measurement or by name, in place of the launchers' own.

A kernel's sizes decide how fast it is and in which order it sums.  They are data: kernels/OP/tiles.py has an operation's named
alternatives, a launcher asks `chosen` when it prepares a launch, and whoever trains sets them before anything is captured.
"""

from collections.abc import Callable, Hashable

Tiles = dict[str, int]
_CHOSEN: dict[Hashable, Tiles] = {}
# What lets go of launches that were prepared before: `memoised` of launch.py adds its functions.
FORGET: list[Callable[[], None]] = []


def chosen(*where: Hashable) -> Tiles:
    """The sizes for a kernel's function, by its name, and for what distinguishes a problem; {}: the launcher's own."""
    return _CHOSEN.get(where, {})


def use_tiles(tiles: dict[tuple, Tiles]) -> None:
    """From now on these, as `chosen` is asked for them, and no others."""
    _CHOSEN.clear()
    _CHOSEN.update(tiles)
    for forget in FORGET:
        forget()
