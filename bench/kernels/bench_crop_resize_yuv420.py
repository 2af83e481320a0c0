"""crop_resize_yuv420: random crops of windows in luma and chroma.  fp32 is the result's type."""

import torch

from bench.kernels.bench_crop_resize import draw_crops, one_level
from bench.kernels.suite import Size
from mimir_fast.kernels import crop_resize_yuv420
from tests.support.cases import Case


def cases(size: Size, dtype: str) -> list[Case]:
    if dtype != "fp32":
        return []
    height, width = size.side * 5 // 4, size.side * 2
    shape = {"B": size.B, "side": size.side, "h": height, "w": width}

    def draw(device: torch.device) -> dict:
        return draw_crops(size, height, width, 3 * width * ((height + 1) // 2), device)

    return [Case("crop_resize_yuv420", shape, dtype, draw, crop_resize_yuv420, judge=one_level, usual="fp32")]
