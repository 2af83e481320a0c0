"""crop_resize in Triton: both passes on a tile of results, so that the image between them is never stored."""

from functools import partial

import triton
import triton.language as tl

from mimir_fast.kernels._shared.bicubic import (
    SCHEMA,
    across,
    down,
    halves,
    launch_tiles,
    no_result,
    rounded,
    side_of,
    store,
    taps_of,
    tile_launches,
    tile_of,
    total_of,
    weights_of,
)
from mimir_fast.kernels._shared.launch import Launch
from mimir_fast.kernels._shared.registration import register


@triton.jit
def _crop_resize_kernel(
    packed, offsets, sizes, boxes, flips, crops, S,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """formula      p = round(sum_k u[x,k] w[i,k]); crops = round(sum_i v[y,i] p[i,x]) / 255; both clamped to 0..255
    shapes       packed [N], offsets [B], sizes [B,2], boxes [B,4], flips [B] -> crops [B,3,S,S], all contiguous
    dtypes       uint8 pixels, fp32 boxes, weights of two fp16 numbers each, fp32 sums; crops fp32 or uint8
    bytes        the boxes' pixels once (margins of tiles again, from L2), crops once
    determinism  fixed order
    source       Keys, Cubic Convolution Interpolation, 1981; widened for reduction and rounded between the passes as Pillow's
    """
    image, y_Y1, x_1X = tile_of(S, HEIGHT, WIDTH)
    # The place of each column's result in the image that is not mirrored.
    from_1X = tl.where(tl.load(flips + image), S - 1 - x_1X, x_1X)
    columns = tl.load(sizes + 2 * image + 1)
    top, height, begin_y, step_y = side_of(boxes + 4 * image, tl.load(sizes + 2 * image), S, 1.0)
    left, width, begin_x, step_x = side_of(boxes + 4 * image + 1, columns, S, 1.0)
    pitch = 3 * columns
    corner = packed + tl.load(offsets + image) + (top * pitch + 3 * left)
    # 32 bits suffice inside of a block of pixels; in the window, and of windows in the buffer, they may not.
    offset_RK = tl.arange(0, ROWS)[:, None] * pitch + 3 * tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    low_y, high_y = taps_of(y_Y1, S, height, begin_y, step_y)
    low_x, high_x = taps_of(from_1X, S, width, begin_x, step_x)
    share_1X = tl.div_rn(1.0, total_of(from_1X, width, begin_x, step_x))
    red_YX = tl.zeros([HEIGHT, WIDTH], tl.float32)
    green_YX, blue_YX = red_YX, red_YX
    for first_row in range(low_y, high_y, ROWS):
        red_RX = tl.zeros([ROWS, WIDTH], tl.float32)
        green_RX, blue_RX = red_RX, red_RX
        row_R = first_row + tl.arange(0, ROWS)
        for first_column in range(low_x, high_x, COLUMNS):
            column_K = first_column + tl.arange(0, COLUMNS)
            high_KX, low_KX = halves(weights_of(column_K[:, None], from_1X, width, begin_x, step_x) * share_1X)
            pixel_RK = corner + (first_row * pitch + 3 * first_column) + offset_RK
            there_RK = (row_R[:, None] < height) & (column_K[None, :] < width)
            red_RX = across(tl.load(pixel_RK, mask=there_RK, other=0), high_KX, low_KX, red_RX)
            green_RX = across(tl.load(pixel_RK + 1, mask=there_RK, other=0), high_KX, low_KX, green_RX)
            blue_RX = across(tl.load(pixel_RK + 2, mask=there_RK, other=0), high_KX, low_KX, blue_RX)
        high_YR, low_YR = halves(weights_of(row_R[None, :], y_Y1, height, begin_y, step_y))
        red_YX = down(high_YR, low_YR, rounded(red_RX), red_YX)
        green_YX = down(high_YR, low_YR, rounded(green_RX), green_YX)
        blue_YX = down(high_YR, low_YR, rounded(blue_RX), blue_YX)
    share_Y1 = tl.div_rn(1.0, total_of(y_Y1, height, begin_y, step_y))
    store(crops, image, 0, y_Y1, x_1X, S, rounded(red_YX * share_Y1))
    store(crops, image, 1, y_Y1, x_1X, S, rounded(green_YX * share_Y1))
    store(crops, image, 2, y_Y1, x_1X, S, rounded(blue_YX * share_Y1))


crop_resize_forward = partial(launch_tiles, _crop_resize_kernel)
crop_resize = register("crop_resize", SCHEMA, crop_resize_forward, no_result)


def launches() -> list[Launch]:
    return tile_launches(crop_resize_forward, "_crop_resize_kernel")
