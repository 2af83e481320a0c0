"""Patch tiles: Triton building blocks for kernels that work on a few image patches per program.  No operation of its own.

A tile is [ROWS, BLOCK]: ROWS neighbouring patches of one image, P = C*p*p numbers each, padded to a power of two.
The numbers of a patch have two orders: (channel, row, column) in the image and (row, column, channel) in the prediction.
A program works in one order, with full-width accesses on that side, and reads the other side element by element: each byte
still comes from memory once, and the permutation happens in the L1 cache.
"""

import triton
import triton.language as tl

# Numbers per program; a larger patch has a program of its own.
TILE = 1024
# 8 numbers per thread: one 16-byte access in bf16, two in fp32.
NUM_WARPS = 4


@triton.constexpr_function
def tile_block(numbers: int) -> int:
    """Columns of a tile: P rounded up to a power of two."""
    return triton.next_power_of_2(numbers)


@triton.constexpr_function
def tile_rows(numbers: int) -> int:
    """Rows of a tile: as many whole patches as TILE numbers hold, at least one."""
    return max(1, TILE // triton.next_power_of_2(numbers))


def tile_grid(batch: int, patches: int, numbers: int) -> tuple[int]:
    """One program per tile; a tile never spans two images."""
    return (batch * triton.cdiv(patches, tile_rows(numbers)),)


@triton.jit
def tile_rows_of(L, ROWS: tl.constexpr):
    """This program's image (int64, so that offsets are) and its patches [ROWS,1]."""
    blocks = tl.cdiv(L, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch_R1 = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    return image, patch_R1


@triton.jit
def image_offsets(image, patch_R1, number_1N, L, grid_w, C: tl.constexpr, PATCH: tl.constexpr):
    """Offsets into contiguous images [B,C,H,W] of numbers in (channel, row, column) order.

    Split as (channel and row, column): in this form the compiler sees runs of PATCH and emits 16-byte accesses.
    """
    line_1N = number_1N // PATCH
    row_RN = patch_R1 // grid_w * PATCH + line_1N % PATCH
    column_RN = patch_R1 % grid_w * PATCH + number_1N % PATCH
    plane_1N = line_1N // PATCH * (L * PATCH * PATCH)
    return image * (L * C * PATCH * PATCH) + (plane_1N + row_RN * (grid_w * PATCH) + column_RN)


@triton.jit
def to_prediction_order(number_1N, C: tl.constexpr, PATCH: tl.constexpr):
    """Index in the prediction's order of number n of the image's order."""
    return number_1N % (PATCH * PATCH) * C + number_1N // (PATCH * PATCH)


@triton.jit
def to_image_order(number_1N, C: tl.constexpr, PATCH: tl.constexpr):
    """Index in the image's order of number n of the prediction's order."""
    return number_1N % C * (PATCH * PATCH) + number_1N // C


@triton.jit
def normalise(tile_RN, inside_1N, P: tl.constexpr, FLOOR: tl.constexpr):
    """Each patch minus its mean, over s = sqrt(unbiased variance + FLOOR); returns it and 1/s [ROWS,1]."""
    # Numbers past P were loaded as zeros: they add nothing to the sum, but after centring would add to the variance.
    centred_RN = tl.where(inside_1N, tile_RN - tl.sum(tile_RN, axis=1, keep_dims=True) / P, 0.0)
    variance_R1 = tl.sum(centred_RN * centred_RN, axis=1, keep_dims=True) / (P - 1)
    rstd_R1 = 1.0 / tl.sqrt(variance_R1 + FLOOR)
    return centred_RN * rstd_R1, rstd_R1


@triton.jit
def target_gradient(error_RN, target_RN, inside_1N, P: tl.constexpr):
    """s times the gradient through t^ = (t - mean)/s: e - mean(e) - t^ <e, t^>/(P-1), for e = d loss/d t^."""
    mean_R1 = tl.sum(error_RN, axis=1, keep_dims=True) / P
    along_R1 = tl.sum(error_RN * target_RN, axis=1, keep_dims=True) / (P - 1)
    return tl.where(inside_1N, error_RN - mean_R1 - target_RN * along_R1, 0.0)
