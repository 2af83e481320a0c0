"""Tile sizes of mlp's kernels beside those that its launchers take by themselves (kernel.py), by name."""

from mimir_fast.kernels._shared.tiles import Tiles


def alternatives(generation: int) -> dict[str, dict[str, Tiles]]:
    """{name: {kernel's function: sizes}} for a GPU's generation, 8 an A100 and 9 an H100; what is expected to win first."""
    return {}
