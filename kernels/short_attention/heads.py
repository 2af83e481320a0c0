"""What the kernels of short_attention share: which heads a program handles, tiles of keys and of queries.

Shapes: B batch, T tokens, the last of them queries, N heads, d numbers per head, D = N*d.

A program handles one image and a group of neighbouring heads, W columns in all: at least 16, so that rows are whole sectors
and products long enough for matrix instructions.  A tile of queries [R,W] has the group's heads one below the other, as many
queries of each: a row keeps its own head's columns and has zeros in the others, so that its products are that head's.
Keys and values are tuples of tiles [K,W]: tiles are powers of two and T is often one more than such.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

import math

import triton
import triton.language as tl


@triton.constexpr_function
def heads_per_program(head: int) -> int:
    """Neighbouring heads of a group: as many as 16 columns hold, at least one."""
    return max(1, 16 // head)


@triton.constexpr_function
def stacked(head: int) -> int:
    """Heads that a tile of queries has room for: a power of two."""
    return triton.next_power_of_2(heads_per_program(head))


@triton.constexpr_function
def columns(head: int) -> int:
    """Columns of a group, W: a power of two."""
    return max(16, triton.next_power_of_2(heads_per_program(head) * head))


@triton.constexpr_function
def key_parts(tokens: int, keys: int) -> tuple:
    """How many keys each part has: powers of two from `keys` down to 16, in all T rounded up to a multiple of 16."""
    parts: tuple[int, ...] = ()
    left = -(-tokens // 16) * 16
    while left:
        part = min(keys, 1 << (left.bit_length() - 1))
        parts, left = (*parts, part), left - part
    return parts


@triton.constexpr_function
def before(parts: tuple, i: int) -> int:
    """The first key of part i."""
    return sum(parts[:i])


@triton.constexpr_function
def exponent_scale(head: int) -> float:
    """exp(s / sqrt(d)) = 2^(s * exponent_scale)."""
    return 1 / (math.sqrt(head) * math.log(2))


@triton.jit
def _group(N, HEAD: tl.constexpr):
    """This program's image (int64, so that offsets are), first head, columns [1,W] of D, and which of them exist."""
    # The last group can have fewer heads than the others.
    groups = tl.cdiv(N, heads_per_program(HEAD))
    image = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * heads_per_program(HEAD)
    inside_1W = tl.arange(0, columns(HEAD))[None, :]
    column_1W = head * HEAD + inside_1W
    exists_1W = (inside_1W < heads_per_program(HEAD) * HEAD) & (column_1W < N * HEAD)
    return image, head, column_1W, exists_1W


@triton.jit
def _own_head(HEAD: tl.constexpr, ROWS: tl.constexpr):
    """Which columns belong to a row's own head [R,W], in a tile of queries."""
    row_R1 = tl.arange(0, ROWS)[:, None]
    return row_R1 // (ROWS // stacked(HEAD)) == tl.arange(0, columns(HEAD))[None, :] // HEAD


@triton.jit
def _query_rows(start, queries, exists_1W, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """A tile's queries [R,1] from `start` on, and which of its numbers exist [R,W]."""
    row_R1 = start + tl.arange(0, ROWS)[:, None] % (ROWS // stacked(HEAD))
    return row_R1, (row_R1 < queries) & exists_1W & _own_head(HEAD, ROWS)


@triton.jit
def _sum_places(start, queries, head, N, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile's rows [R] are among an image's log-sum-exps [N,queries], from the first head on, and which exist [R]."""
    stack_R = tl.arange(0, ROWS)
    row_R, own_R = start + stack_R % (ROWS // stacked(HEAD)), stack_R // (ROWS // stacked(HEAD))
    exists_R = (row_R < queries) & (own_R < heads_per_program(HEAD)) & (head + own_R < N)
    return own_R * queries + row_R, exists_R


@triton.jit
def _load_parts(row, stride, exists_1W, T: tl.constexpr, PARTS: tl.constexpr):
    """All keys, or values: tiles [K,W]."""
    tiles: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        key_K1 = before(PARTS, i) + tl.arange(0, PARTS[i])[:, None]
        tiles = tiles + (tl.load(row + key_K1 * stride, mask=(key_K1 < T) & exists_1W, other=0),)
    return tiles
