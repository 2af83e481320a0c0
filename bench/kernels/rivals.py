"""Implementations from elsewhere, and judges of operations whose values cannot keep to the usual error budget.

A rival takes an operation's inputs.  A judge takes (value, eager's, float64's) and says what is wrong with the value, or "".
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.simulated_gpu import marker
from mimir_fast.kernels.nhsic.reference import RIDGE, center_rows, ridge_inverse
from mimir_fast.models.attention import PACKAGES, attention

EPS = 8 / 255
FLIPPED = 1e-3  # share of pixels whose gradient may be so close to zero that rounding decides its sign
CLOSE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 2e-2}  # of the penalty: relative, in the L2 norm


# ---- attention: the trainer's backends


def of_attention(dtype: str) -> dict:
    """Those of GPUs, which CPUs do not have; eager leaves the choice among torch's own to torch."""
    if not torch.cuda.is_available() or dtype == "fp32":
        return {}
    found = {"sdpa flash": by_sdpa(SDPBackend.FLASH_ATTENTION)}
    if not marker():  # it has no cuDNN
        found["sdpa cudnn"] = by_sdpa(SDPBackend.CUDNN_ATTENTION)
    return found | {name: by_package(name) for name in PACKAGES if find_spec(name)}


def by_sdpa(backend: SDPBackend):
    def rival(qkv_BTQ: Tensor, num_heads: int) -> Tensor:
        with sdpa_kernel(backend):
            return attention(qkv_BTQ, num_heads, backend="sdpa")

    return rival


def by_package(name: str):
    return lambda qkv_BTQ, num_heads: attention(qkv_BTQ, num_heads, backend=name)


# ---- the penalty.  A rival that never stores the kernel matrices, as KeOps does, cannot be: their inverses are needed


def of_nhsic(dtype: str) -> dict:
    return {} if marker() else {"cdist": by_cdist}  # a simulated GPU has no float64 solver for Cholesky's gradient


def by_cdist(x_md: Tensor, y_me: Tensor, sigma: float = 5.0) -> Tensor:
    """Kernel matrices from torch.cdist, differentiated by autograd; the reference's inverses in float64."""
    m = len(x_md)
    inverses = []
    for rows in (x_md, y_me):
        rows = center_rows(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        distances_mm = torch.cdist(rows, rows).double().square()
        inverses.append(ridge_inverse(torch.exp(-distances_mm / (2 * sigma**2 * rows.shape[1]))))
    px, py = inverses
    c = RIDGE * m
    return (m - c * px.trace() - c * py.trace() + c**2 * (px * py).sum()).float()


def close(dtype: str):
    """The m x m algebra is fp32 in the kernel and float64 in the reference: eager is no yardstick."""

    def judge(value: Tensor, eager: Tensor, truth: Tensor) -> str:
        error = ((value.double() - truth).norm() / truth.norm()).item()
        return "" if error <= CLOSE[dtype] else f"off by {error:.3g} relative, {CLOSE[dtype]:g} is allowed"

    return judge


# ---- the attack


def of_start(dtype: str) -> dict:
    return {"torch noise": torch_noise}


def torch_noise(images_BCHW: Tensor, bounds_4C: Tensor, seed: Tensor) -> Tensor:
    """Uniform noise from torch's generator, which has no seed on the device; a tensor of noise is stored."""
    eps, _, lo, hi = bounds_4C.to(images_BCHW.dtype)[:, :, None, None]
    return torch.clamp(images_BCHW + eps * torch.empty_like(images_BCHW).uniform_(-1, 1), lo, hi)


def moments(value: Tensor, inputs: dict) -> str:
    """Whether other numbers than ours look like uniform noise in the ball, where the range [0, 1] does not cut it."""
    images = inputs["images_BCHW"]
    noise = (value.double() - images.double())[(images > EPS) & (images < 1 - EPS)]
    rounding = torch.finfo(value.dtype).eps
    if not noise.abs().max() <= EPS + 2 * rounding:
        return f"off by {noise.abs().max().item():.3g}, the ball has {EPS:.3g}"
    mean, deviation = noise.mean().item(), noise.std().item()
    slack = 5 * EPS / len(noise) ** 0.5 + rounding
    if abs(mean) > slack or abs(deviation - EPS / 3**0.5) > slack:
        return f"noise has mean {mean:.3g} and deviation {deviation:.3g}, expected 0 and {EPS / 3**0.5:.3g}"
    return ""


def few_signs_flipped(value: Tensor, eager: Tensor, truth: Tensor) -> str:
    """All pixels right but for some whose gradient's sign is rounding; NaN counts as wrong."""
    right = (value.double() - truth).abs() <= torch.finfo(value.dtype).eps * 4
    share = 1 - right.double().mean().item()
    return "" if share <= FLIPPED else f"{share:.2%} of the pixels are wrong, {FLIPPED:.2%} may be"


# ---- crops


def of_crops(dtype: str) -> dict:
    found = {"torchvision": by_torchvision}
    if torch.cuda.is_available() and not marker():
        found |= {"CV-CUDA": by_cv_cuda} if find_spec("cvcuda") else {}
        found |= {"DALI": by_dali} if find_spec("nvidia") and find_spec("nvidia.dali") else {}
    return found


def one_level(value: Tensor, eager: Tensor, truth: Tensor) -> str:
    """A level at most, but for few places where sums between the passes round otherwise; NaN counts as wrong."""
    share = 1 - (255 * (value.double() - truth).abs() < 1.01).double().mean().item()
    return "" if share <= 1e-5 else f"{share:.2%} of the values are off by more than a level"


def windows(packed_N, offsets_B, sizes_B2) -> list[Tensor]:
    """Images [h,w,3]."""
    where = zip(offsets_B.tolist(), sizes_B2.tolist())
    return [packed_N[first : first + 3 * h * w].view(h, w, 3) for first, (h, w) in where]


def regions(boxes_B4, flips_B) -> list[tuple]:
    """(top, left, bottom, right), left and right exchanged where it is flipped, as CV-CUDA and DALI want it."""
    sides = [
        (left, left + width)[:: -1 if flip else 1] for (_, left, _, width), flip in zip(boxes_B4.tolist(), flips_B)
    ]
    return [(top, first, top + height, last) for (top, _, height, _), (first, last) in zip(boxes_B4.tolist(), sides)]


def to_floats(images_bssc: Tensor) -> Tensor:
    return images_bssc.permute(0, 3, 1, 2).float() / 255


def by_torchvision(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """Image by image; boxes of whole pixels only."""
    from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

    crops = []
    for image, box, flip in zip(windows(packed_N, offsets_B, sizes_B2), boxes_B4.int().tolist(), flips_B.tolist()):
        crop = resized_crop(image.permute(2, 0, 1), *box, [size, size], interpolation=3, antialias=True)
        crops.append(horizontal_flip(crop) if flip else crop)
    return torch.stack(crops).float() / 255


def by_cv_cuda(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int) -> Tensor:
    """hq_resize with regions, by CV-CUDA's documentation: it was not run yet."""
    import cvcuda

    crops = packed_N.new_empty(len(offsets_B), size, size, 3)
    source, target = (cvcuda.TensorBatch(len(crops)) for _ in range(2))
    for batch, images in ((source, windows(packed_N, offsets_B, sizes_B2)), (target, crops)):
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

    images = dali.as_batch(windows(packed_N, offsets_B, sizes_B2), layout="HWC")
    start, end = map(dali.as_batch, torch.tensor(regions(boxes_B4, flips_B)).chunk(2, dim=1))
    how = {"interp_type": DALIInterpType.INTERP_CUBIC, "antialias": True, "roi_start": start, "roi_end": end}
    return to_floats(dali.resize(images, size=(size, size), **how).torch())
