"""Tile sizes of mlp's kernels beside those that its launchers take by themselves (kernel.py), by name.

All pass the compile gate: no spills, shared memory within the limits.  docs/performance.md says what is expected of them.
"""

from mimir_fast.kernels._shared.tiles import Tiles

KERNELS = ("_linear_gelu_kernel", "_gelu_linear_grad_kernel")
# Generation of GPUs -> name -> sizes, in the order of kernel.py's; what is expected to win first.
SIZES: dict[int, dict[str, Tiles]] = {
    8: {
        # Three programs on a multiprocessor: 150 registers a thread, where the launcher's own sizes take 250.
        "low": {"BLOCK_M": 64, "BLOCK_F": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
        "slim": {"BLOCK_M": 128, "BLOCK_F": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    9: {
        # Twice the arithmetic per byte of shared memory; one program of 8 warps instead of two of 4.
        "wide": {"BLOCK_M": 128, "BLOCK_F": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        # Half the registers of a thread, twice the warps.
        "warps8": {"BLOCK_M": 128, "BLOCK_F": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        # More programs, whose GELU and products overlap better where D is small.
        "low": {"BLOCK_M": 64, "BLOCK_F": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    },
}


def alternatives(width: int, hidden: int, generation: int) -> dict[str, dict[str, Tiles]]:
    """{name: {kernel's function: sizes}} for a GPU's generation, 8 an A100 and 9 an H100, and widths that the tiles divide."""
    return {
        name: dict.fromkeys(KERNELS, sizes)
        for name, sizes in SIZES.get(min(generation, 9), {}).items()
        if width % sizes["BLOCK_K"] == 0 and hidden % sizes["BLOCK_F"] == 0
    }
