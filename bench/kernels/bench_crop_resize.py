"""crop_resize: random crops of windows of 8-bit RGB, as wide as a cache's images.  fp32 is the result's type."""

import torch
from torch import Tensor

from bench.kernels.suite import Size
from mimir_fast.kernels import crop_resize
from tests.support.cases import Case


def draw_crops(size: Size, height: int, width: int, count: int, device: torch.device) -> dict:
    """B windows of height x width pixels in count bytes each, their boxes the middle with a margin of an eighth."""
    return {
        "packed_N": torch.randint(256, (size.B * count,), dtype=torch.uint8, device=device),
        "offsets_B": torch.arange(size.B, device=device) * count,
        "sizes_B2": torch.tensor([height, width], device=device).repeat(size.B, 1),
        "boxes_B4": torch.tensor([0.0, width // 8, height, width * 3 // 4], device=device).repeat(size.B, 1),
        "flips_B": torch.arange(size.B, device=device) % 2 == 1,
        "size": size.side,
    }


def one_level(value: Tensor, eager: Tensor, truth: Tensor) -> str:
    """A level at most, but for few places where sums between the passes round otherwise; NaN counts as wrong."""
    share = 1 - (255 * (value.double() - truth).abs() < 1.01).double().mean().item()
    return "" if share <= 1e-5 else f"{share:.2%} of the values are off by more than a level"


def by_torchvision(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """Image by image; boxes of whole pixels only."""
    from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

    crops = []
    for offset, (h, w), box, flip in zip(*(t.tolist() for t in (offsets_B, sizes_B2, boxes_B4.int(), flips_B))):
        image_3hw = packed_N[offset : offset + 3 * h * w].view(h, w, 3).permute(2, 0, 1)
        crop = resized_crop(image_3hw, *box, [size, size], interpolation=3, antialias=True)
        crops.append(horizontal_flip(crop) if flip else crop)
    return torch.stack(crops).float() / 255


def cases(size: Size, dtype: str) -> list[Case]:
    if dtype != "fp32":
        return []
    height, width = size.side * 5 // 4, size.side * 2
    shape = {"B": size.B, "side": size.side, "h": height, "w": width}

    def draw(device: torch.device) -> dict:
        return draw_crops(size, height, width, 3 * height * width, device)

    rivals = {"torchvision": by_torchvision}
    return [Case("crop_resize", shape, dtype, draw, crop_resize, rivals, judge=one_level, usual="fp32")]
