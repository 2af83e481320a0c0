"""Tile sizes of short_attention's kernels beside those that its launchers take by themselves (kernel.py), by name.

All pass the compile gate: no spills, shared memory within the limits.  docs/performance.md says what is expected of them.
"""

from mimir_fast.kernels._shared.tiles import Tiles

FORWARD, BACKWARD = "_attend_kernel", "_attend_grad_kernel"
# One block of queries; what is expected to win first.
ONE_BLOCK: dict[str, dict[str, Tiles]] = {
    # Fewer instructions in each warp, and more warps to hide what a load takes.
    "warps8": {kernel: {"ROWS": 64, "KEYS": 64, "num_warps": 8} for kernel in (FORWARD, BACKWARD)},
    # Two blocks of queries: less padding where there are few more tokens than 32.
    "rows32": {
        FORWARD: {"ROWS": 32, "KEYS": 64, "num_warps": 2},
        BACKWARD: {"ROWS": 32, "KEYS": 64, "num_warps": 4},
    },
}
# Several blocks, of heads narrow enough for two of them to be computed at once.
NARROW: dict[str, dict[str, Tiles]] = {"rows64": {FORWARD: {"ROWS": 64, "KEYS": 64, "num_warps": 4}}}


def alternatives(tokens: int, head: int, itemsize: int) -> dict[str, dict[str, Tiles]]:
    """{name: {kernel's function: sizes}} for sequences of these tokens, on GPUs of all generations."""
    if itemsize != 2:
        return {}
    if 32 < tokens <= 64 and 32 < head <= 64:
        return ONE_BLOCK
    return NARROW if 64 < tokens <= 256 and head <= 16 else {}
