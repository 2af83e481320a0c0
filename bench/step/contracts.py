"""The bytes and FLOPs of our own operations: the `bytes` line of each docstring under kernels/ as a formula.

Shapes: B batch, L patches, M removed, P numbers per patch, m samples, d numbers per sample.  Bytes are those
that must come from or go to memory, not what is read again from cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.step.trace import Call, Spec

FLOPS_OF = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}  # whose peak prices a product
INDEX = 8  # bytes of an int64
TF32_PRODUCTS = 3  # nhsic's fp32 products are three tf32 ones
SQUARES = 5  # [m,m] fp32 matrices of one side of nhsic that are written and read: kernel, ridged, factor, inverse, P


@dataclass(frozen=True)
class Contract:
    """Bytes, FLOPs by precision, and dense solves as (ATen's name, rows)."""

    bytes: float
    flops: dict[str, float] = field(default_factory=dict)
    solves: list[tuple[str, int]] = field(default_factory=list)


def _written(call: Call) -> int:
    return sum(spec.bytes for spec in call.writes)


def _once(call: Call, *names: str) -> int:
    """Arguments read whole, once."""
    return sum(call.read(name).bytes for name in names)


def mask_indices(call: Call) -> Contract:
    return Contract(_once(call, "noise") + _written(call))


def patch_gather(call: Call) -> Contract:
    """The kept patches read in the images' storage and written in the output's, the indices once."""
    (patches,), images = call.writes, call.read("images")
    count = patches.shape[0] * patches.shape[1] * patches.shape[2]
    return Contract(count * _width(images) + patches.bytes + _once(call, "ids_keep"))


def patch_gather_grad(call: Call) -> Contract:
    return Contract(_once(call, "grad", "ids_keep") + _written(call))


def linf_start(call: Call) -> Contract:
    return Contract(_once(call, "images") + _written(call))


def linf_patch_step(call: Call) -> Contract:
    return Contract(_once(call, "images", "adv", "grad_visible", "pred", "ids_restore") + _written(call))


def masked_patch_loss(call: Call) -> Contract:
    """pred, as many numbers of the images, ids; one fp32 per patch written and read."""
    B, M, _ = call.read("pred").shape
    return Contract(_predicted(call) + 2 * 4 * B * M)


def masked_patch_loss_grad_pred(call: Call) -> Contract:
    return Contract(_predicted(call) + _written(call))


def masked_patch_loss_grad_images(call: Call) -> Contract:
    """The images' gradient is cleared, then written where patches are predicted."""
    B, M, P = call.read("pred").shape
    return Contract(_predicted(call) + _written(call) + B * M * P * _width(call.read("images")))


def _predicted(call: Call) -> int:
    B, M, P = call.read("pred").shape
    return _once(call, "pred", "ids") + B * M * P * _width(call.read("images"))


def token_restore(call: Call) -> Contract:
    return Contract(_once(call, "tokens", "mask_token", "pos_embed", "ids_shuffle") + _written(call))


def token_restore_grad(call: Call) -> Contract:
    """The gradient of removed patches only; how many is not among the tensors, so all rows are counted: a bound from above."""
    return Contract(_once(call, "grad") + _written(call))


def nhsic(call: Call) -> Contract:
    """Each side: rows once, centred fp32 rows written and read, [m,m] matrices; half a Gram product, two dense solves."""
    data, flops, solves = 0, 0.0, []
    for name in ("x", "y"):
        m, d = call.read(name).shape
        data += call.read(name).bytes + 2 * 4 * m * d + SQUARES * 2 * 4 * m * m
        flops += TF32_PRODUCTS * m * m * d  # symmetric: half of 2 m m d
        solves += [("linalg_cholesky_ex", m), ("cholesky_inverse", m)]
    return Contract(data, {"tf32": flops}, solves)


def nhsic_grad(call: Call) -> Contract:
    """Centred rows once, the gradient once, k and both P; two [m,m] products and one with the rows."""
    m, d = call.read("rows").shape
    data = _once(call, "rows", "k", "p_self", "p_other") + SQUARES * 2 * 4 * m * m + _written(call)
    return Contract(data, {"tf32": TF32_PRODUCTS * (2 * 2.0 * m**3 + 2.0 * m * m * d)})


def short_attention(call: Call) -> Contract:
    """q, k, v read and the output written; two products per head and pair of tokens."""
    return Contract(_once(call, "qkv") + _written(call), _attended(call, 4))


def short_attention_grad(call: Call) -> Contract:
    """q, k, v and the gradient read, dq, dk and dv written; the scores again and four products more."""
    return Contract(_once(call, "qkv", "grad") + _written(call), _attended(call, 10))


def _attended(call: Call, flops: int) -> dict[str, float]:
    B, T, width = call.read("qkv").shape
    return {FLOPS_OF[call.read("qkv").dtype]: flops * B * T * T * width / 3}


def _width(spec: Spec) -> int:
    """Bytes per number."""
    return {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": INDEX}[spec.dtype]


CONTRACTS: dict[str, Callable[[Call], Contract]] = {
    "mask_indices": mask_indices,
    "patch_gather": patch_gather,
    "patch_gather_grad": patch_gather_grad,
    "linf_start": linf_start,
    "linf_patch_step": linf_patch_step,
    "masked_patch_loss": masked_patch_loss,
    "masked_patch_loss_grad_pred": masked_patch_loss_grad_pred,
    "masked_patch_loss_grad_images": masked_patch_loss_grad_images,
    "token_restore": token_restore,
    "token_restore_grad": token_restore_grad,
    "nhsic": nhsic,
    "short_attention": short_attention,
    "short_attention_grad": short_attention_grad,
    "nhsic_grad": nhsic_grad,
}
