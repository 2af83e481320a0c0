"""The bytes and FLOPs of our own operations: the `bytes` line of each docstring under kernels/ as a formula.

Shapes: B batch, M patches removed, P numbers per patch, m samples, d numbers per sample.  Bytes are those that must come from
or go to memory, not what is read again from cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from bench.step.trace import Call

FLOPS_OF = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}  # whose peak prices a product
WIDTH = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # bytes per number
TF32_PRODUCTS = 3  # nhsic's fp32 products are three tf32 ones
SQUARES = 5  # [m,m] fp32 matrices of one side of nhsic that are written and read: kernel, ridged, factor, inverse, P


@dataclass(frozen=True)
class Contract:
    """Bytes, FLOPs by precision, dense solves as (ATen's name, rows), and the class of the roofline's table."""

    bytes: float
    flops: dict[str, float] = field(default_factory=dict)
    solves: list[tuple[str, int]] = field(default_factory=list)
    kind: str = "ours"


def read(call: Call, *names: str) -> int:
    """Bytes of arguments (all of them, if none is named) read whole, once."""
    return sum(call.read(name).bytes for name in names or call.reads)


def written(call: Call) -> int:
    return sum(spec.bytes for spec in call.writes)


def once(call: Call) -> Contract:
    """Every argument is read once, every result written once."""
    return Contract(read(call) + written(call))


def patch_gather(call: Call) -> Contract:
    """The kept patches are read in the images' storage and written in the output's, the indices read once."""
    B, K, P = call.writes[0].shape
    return Contract(B * K * P * WIDTH[call.read("images").dtype] + written(call) + read(call, "ids_keep"))


def masked_patch_loss(call: Call, extra: Callable[[int, int], float]) -> Contract:
    """pred, as many numbers of the images, ids; extra(B * M, bytes of those numbers): what comes on top."""
    B, M, P = call.read("pred").shape
    pixels = B * M * P * WIDTH[call.read("images").dtype]
    return Contract(read(call, "pred", "ids") + pixels + extra(B * M, pixels))


def add_layer_norm_grad(call: Call) -> Contract:
    """ds (if there), dn, the sum and the statistics read, dx (and its 16-bit copy) written; partial column sums both."""
    from mimir_fast.kernels.add_layer_norm.kernel import groups

    sums = sum(spec.shape[0] for spec in call.writes[2:])  # numbers of the column sums that are asked for
    rows, width = call.read("statistics").shape[1], call.read("weight").shape[0]
    return Contract(read(call) + written(call) + 2 * 4 * sums * groups(rows, width, sums > 0))


def nhsic(call: Call) -> Contract:
    """Each side: rows once, centred fp32 rows written and read, [m,m] matrices; half a Gram product, two dense solves."""
    data, flops, solves = 0, 0.0, []
    for name in ("x", "y"):
        m, d = call.read(name).shape
        data += read(call, name) + 2 * 4 * m * d + SQUARES * 2 * 4 * m * m
        flops += TF32_PRODUCTS * m * m * d  # symmetric: half of 2 m m d
        solves += [("linalg_cholesky_ex", m), ("cholesky_inverse", m)]
    return Contract(data, {"tf32": flops}, solves)


def nhsic_grad(call: Call) -> Contract:
    """Centred rows once, the gradient once, k and both P; two [m,m] products and one with the rows."""
    m, d = call.read("rows").shape
    data = read(call, "rows", "k", "p_self", "p_other") + SQUARES * 2 * 4 * m * m + written(call)
    return Contract(data, {"tf32": TF32_PRODUCTS * (2 * 2.0 * m**3 + 2.0 * m * m * d)})


def linear_gelu(call: Call) -> Contract:
    """One product: its two factors and the bias read, GELU's input and output written."""
    return Contract(read(call) + written(call), _multiplied(call, "x"), kind="GEMM")


def gelu_linear_grad(call: Call) -> Contract:
    """One product: its two factors and GELU's input read, the gradient written; per tile of rows one fp32 row of sums both."""
    from mimir_fast.kernels.mlp.kernel import HOPPER

    sums = -(-call.read("grad").shape[0] // HOPPER["BLOCK_M"]) * call.writes[1].shape[0]
    return Contract(read(call) + written(call) + 2 * 4 * sums, _multiplied(call, "grad"), kind="GEMM")


def _multiplied(call: Call, rows: str) -> dict[str, float]:
    (m, d), (_, f) = call.read(rows).shape, call.writes[0].shape
    return {FLOPS_OF[call.read(rows).dtype]: 2.0 * m * d * f}


def short_attention(call: Call, flops: int) -> Contract:
    """q, k, v (and the gradient) read once; `flops` per head's number and pair of tokens."""
    qkv = call.read("qkv")
    B, T, width = qkv.shape
    return Contract(read(call) + written(call), {FLOPS_OF[qkv.dtype]: flops * B * T * T * width / 3}, kind="attention")


SIMPLE = "mask_indices patch_gather_grad linf_start linf_patch_step token_restore token_restore_grad add_layer_norm"
CONTRACTS: dict[str, Callable[[Call], Contract]] = {
    **dict.fromkeys(SIMPLE.split(), once),
    "patch_gather": patch_gather,
    # one fp32 number per patch, written and read
    "masked_patch_loss": partial(masked_patch_loss, extra=lambda patches, pixels: 2 * 4 * patches),
    "masked_patch_loss_grad_pred": lambda call: masked_patch_loss(call, lambda patches, pixels: written(call)),
    # the images' gradient is cleared, then written where patches are predicted
    "masked_patch_loss_grad_images": lambda call: masked_patch_loss(
        call, lambda patches, pixels: written(call) + pixels
    ),
    "add_layer_norm_grad": add_layer_norm_grad,
    "nhsic": nhsic,
    "nhsic_grad": nhsic_grad,
    "short_attention": partial(short_attention, flops=4),  # two products
    "short_attention_grad": partial(short_attention, flops=10),  # the scores again, and four products
    "linear_gelu": linear_gelu,
    "gelu_linear_grad": gelu_linear_grad,
}
