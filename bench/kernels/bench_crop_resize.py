"""crop_resize: random crops of windows of 8-bit RGB, as wide as a cache's images.  fp32 is the result's type."""

from importlib.util import find_spec

import torch
from torch import Tensor

from bench.kernels.suite import Size
from bench.simulated_gpu import marker
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


def images_of(packed_N, offsets_B, sizes_B2) -> list[Tensor]:
    """The windows as images [h,w,3]."""
    where = zip(offsets_B.tolist(), sizes_B2.tolist())
    return [packed_N[first : first + 3 * h * w].view(h, w, 3) for first, (h, w) in where]


def regions(boxes_B4, flips_B) -> list[tuple]:
    """(top, left, bottom, right), left and right exchanged where it is flipped, as CV-CUDA and DALI want it."""
    found = []
    for (top, left, height, width), flip in zip(boxes_B4.tolist(), flips_B.tolist()):
        first, last = (left + width, left) if flip else (left, left + width)
        found.append((top, first, top + height, last))
    return found


def to_floats(images_bssc: Tensor) -> Tensor:
    return images_bssc.permute(0, 3, 1, 2).float() / 255


def by_torchvision(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """Image by image; boxes of whole pixels only."""
    from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

    crops = []
    for image, box, flip in zip(images_of(packed_N, offsets_B, sizes_B2), boxes_B4.int().tolist(), flips_B.tolist()):
        crop = resized_crop(image.permute(2, 0, 1), *box, [size, size], interpolation=3, antialias=True)
        crops.append(horizontal_flip(crop) if flip else crop)
    return torch.stack(crops).float() / 255


def by_cv_cuda(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """hq_resize with regions, by CV-CUDA's documentation: it was not run yet."""
    import cvcuda

    crops = packed_N.new_empty(len(offsets_B), size, size, 3)
    source, target = (cvcuda.TensorBatch(len(crops)) for _ in range(2))
    for batch, images in ((source, images_of(packed_N, offsets_B, sizes_B2)), (target, crops)):
        for image in images:
            batch.pushback(cvcuda.as_tensor(image, "HWC"))
    stream = cvcuda.as_stream(torch.cuda.current_stream().cuda_stream)
    how = {"antialias": True, "interpolation": cvcuda.Interp.CUBIC, "roi": regions(boxes_B4, flips_B), "stream": stream}
    cvcuda.hq_resize_into(target, source, **how)
    return to_floats(crops)


def by_dali(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """resize with regions, by the documentation of DALI's dynamic mode: it was not run yet."""
    import nvidia.dali.experimental.dynamic as dali
    from nvidia.dali.types import DALIInterpType

    images = dali.as_batch(images_of(packed_N, offsets_B, sizes_B2), layout="HWC")
    start, end = map(dali.as_batch, torch.tensor(regions(boxes_B4, flips_B)).chunk(2, dim=1))
    how = {"interp_type": DALIInterpType.INTERP_CUBIC, "antialias": True, "roi_start": start, "roi_end": end}
    return to_floats(dali.resize(images, size=(size, size), **how).torch())


def rivals() -> dict:
    found = {"torchvision": by_torchvision}
    if torch.cuda.is_available() and not marker():
        found |= {"CV-CUDA": by_cv_cuda} if find_spec("cvcuda") else {}
        found |= {"DALI": by_dali} if find_spec("nvidia") and find_spec("nvidia.dali") else {}
    return found


def cases(size: Size, dtype: str) -> list[Case]:
    if dtype != "fp32":
        return []
    height, width = size.side * 5 // 4, size.side * 2
    shape = {"B": size.B, "side": size.side, "h": height, "w": width}

    def draw(device: torch.device) -> dict:
        return draw_crops(size, height, width, 3 * height * width, device)

    return [Case("crop_resize", shape, dtype, draw, crop_resize, rivals(), judge=one_level, usual="fp32")]
