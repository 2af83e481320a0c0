"""crop_resize_yuv420 in Triton: the three planes of a tile of results one after the other, then its colours."""

from functools import partial

import triton
import triton.language as tl

from mimir_fast.kernels._shared import bt601
from mimir_fast.kernels._shared.bicubic import (
    SCHEMA,
    across,
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

# What Cb and Cr add to red, green and blue.
CB, CR, GREY = (tl.constexpr(value) for value in (bt601.CB, bt601.CR, bt601.GREY))
GREEN_OF_CB = tl.constexpr(-bt601.BLUE * bt601.CB / bt601.GREEN)
GREEN_OF_CR = tl.constexpr(-bt601.RED * bt601.CR / bt601.GREEN)


@triton.jit
def _resampled(
    plane, box, rows, columns, pitch, second, share, y_Y1, x_1X, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The box of one plane at a tile of results, not rounded: [Y,X].

    plane    its row 0; row pairs are `pitch` numbers apart
    second   from the first row of this plane in a pair to the second one, 0 where it has only one
    share    of the box's pixel that is a pixel of this plane: 1, or 0.5 for chroma
    """
    top, height, begin_y, step_y = side_of(box, rows, S, share)
    left, width, begin_x, step_x = side_of(box + 1, columns, S, share)
    low_y, high_y = taps_of(y_Y1, S, height, begin_y, step_y)
    low_x, high_x = taps_of(x_1X, S, width, begin_x, step_x)
    share_1X = tl.div_rn(1.0, total_of(x_1X, width, begin_x, step_x))
    column_K = tl.arange(0, COLUMNS)
    sum_YX = tl.zeros([y_Y1.shape[0], x_1X.shape[1]], tl.float32)
    for first_row in range(low_y, high_y, ROWS):
        row_R = first_row + tl.arange(0, ROWS)
        place_R = top + row_R
        start_R = tl.where(second > 0, place_R // 2 * pitch + place_R % 2 * second, place_R * pitch) + left
        sum_RX = tl.zeros([ROWS, x_1X.shape[1]], tl.float32)
        for first_column in range(low_x, high_x, COLUMNS):
            column_K = first_column + tl.arange(0, COLUMNS)
            high_KX, low_KX = halves(weights_of(column_K[:, None], x_1X, width, begin_x, step_x) * share_1X)
            there_RK = (row_R[:, None] < height) & (column_K[None, :] < width)
            pixel_RK = tl.load(plane + start_R[:, None] + column_K[None, :].to(tl.int64), mask=there_RK, other=0)
            sum_RX = across(pixel_RK, high_KX, low_KX, sum_RX)
        high_YR, low_YR = halves(weights_of(row_R[None, :], y_Y1, height, begin_y, step_y))
        high_RX, low_RX = halves(sum_RX)
        # The product of what both lack in fp16 is below fp32's precision.
        sum_YX = tl.dot(low_YR, high_RX, tl.dot(high_YR, low_RX, tl.dot(high_YR, high_RX, sum_YX)))
    return sum_YX * tl.div_rn(1.0, total_of(y_Y1, height, begin_y, step_y))


@triton.jit
def _crop_resize_yuv420_kernel(
    packed, offsets, sizes, boxes, flips, crops, S,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """formula      crops = clip(round(rgb(u Y v^T, u' Cb v'^T, u' Cr v'^T)), 0, 255) / 255
    shapes       packed [N], offsets [B], sizes [B,2], boxes [B,4], flips [B] -> crops [B,3,S,S], all contiguous
    dtypes       uint8 pixels, fp32 boxes, weights and rows of two fp16 numbers each, fp32 sums; crops fp32 or uint8
    bytes        the boxes' pixels once (margins of tiles again, from L2), crops once
    determinism  fixed order
    source       Keys, Cubic Convolution Interpolation, 1981; ITU-R BT.601 and JFIF 1.02
    """
    image, y_Y1, x_1X = tile_of(S, HEIGHT, WIDTH)
    # The place of each column's result in the image that is not mirrored.
    from_1X = tl.where(tl.load(flips + image), S - 1 - x_1X, x_1X)
    rows, columns = tl.load(sizes + 2 * image), tl.load(sizes + 2 * image + 1)
    half_rows, half_columns = (rows + 1) // 2, (columns + 1) // 2
    window, pitch = packed + tl.load(offsets + image), 6 * half_columns
    red_YX = tl.zeros([HEIGHT, WIDTH], tl.float32)
    green_YX, blue_YX = red_YX, red_YX
    # A loop, so that the code of a plane is there once.
    for plane in range(3):
        luma = plane == 0
        level_YX = _resampled(
            window + tl.where(luma, 0, 3 + plane) * half_columns, boxes + 4 * image,
            tl.where(luma, rows, half_rows), tl.where(luma, columns, half_columns), pitch,
            tl.where(luma, 2 * half_columns, 0), tl.where(luma, 1.0, 0.5), y_Y1, from_1X, S, ROWS, COLUMNS,
        )  # fmt: skip
        level_YX -= tl.where(luma, 0.0, GREY)
        red_YX += level_YX * tl.where(luma, 1.0, tl.where(plane == 1, 0.0, CR))
        green_YX += level_YX * tl.where(luma, 1.0, tl.where(plane == 1, GREEN_OF_CB, GREEN_OF_CR))
        blue_YX += level_YX * tl.where(luma, 1.0, tl.where(plane == 1, CB, 0.0))
    store(crops, image, 0, y_Y1, x_1X, S, rounded(red_YX))
    store(crops, image, 1, y_Y1, x_1X, S, rounded(green_YX))
    store(crops, image, 2, y_Y1, x_1X, S, rounded(blue_YX))


crop_resize_yuv420_forward = partial(launch_tiles, _crop_resize_yuv420_kernel)
crop_resize_yuv420 = register("crop_resize_yuv420", SCHEMA, crop_resize_yuv420_forward, no_result)


def launches() -> list[Launch]:
    return tile_launches(crop_resize_yuv420_forward, "_crop_resize_yuv420_kernel")
