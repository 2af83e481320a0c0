"""Tile sizes of short_attention's kernels beside those that its launchers take by themselves (kernel.py), by name."""

from mimir_fast.kernels._shared.tiles import Tiles


def alternatives(tokens: int, head: int, itemsize: int, generation: int) -> dict[str, dict[str, Tiles]]:
    """{name: {kernel's function: sizes}} for sequences of these tokens; generation: of the GPU, 8 an A100 and 9 an H100."""
    return {}
