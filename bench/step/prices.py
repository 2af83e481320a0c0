"""From a call to its price: the class it belongs to, the bytes and FLOPs it cannot avoid, and what that takes at best."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.peaks import Peak, solve_seconds
from mimir_fast.kernels._shared.cost import Cost, size

CLASSES = ("Inductor", "GEMM", "attention", "ours", "AdamW", "solves", "copies", "other ATen")
PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# passes along the diagonal: factorise 1, substitute forward and back 2
SWEEPS = {
    "linalg_cholesky_ex": 1,
    "cholesky_inverse": 2,
    "cholesky_solve": 2,
    "linalg_lu_factor_ex": 1,
    "linalg_inv_ex": 3,
    "_linalg_solve_ex": 3,
    "linalg_solve_triangular": 1,
}
EIGENSOLVERS = ("_linalg_eigh", "_linalg_eigvals", "_linalg_svd")
COPIES = frozenset(
    "copy_ clone _to_copy fill_ zero_ zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full "
    "scalar_tensor cat stack".split()
)
# of these sources only what is selected is read
SELECTS = {"gather": "self", "index": "self", "index_select": "self", "embedding": "weight", "take": "self"}


@dataclass(frozen=True)
class Price:
    """One call's class, name, bytes, FLOPs by precision, seconds of dense solves; why: empty, or what was not priced."""

    kind: str
    name: str
    bytes: float
    flops: dict[str, float] = field(default_factory=dict)
    solve: float = 0.0
    why: str = ""

    def seconds(self, peak: Peak, shares: dict[str, float] | None = None) -> float:
        """max(FLOPs / peak, bytes / bandwidth, solve): no implementation of this call can be faster.

        shares   of the peaks that are reached (Peak.reached): what is then to be expected is no bound
        """
        shares, own = shares or {}, "own " * (self.name.startswith("mimir_fast") and self.kind != "ours")
        compute = sum(count / peak.flops[precision] for precision, count in self.flops.items())
        compute /= shares.get(own + self.kind, 1)
        return max(compute, self.bytes / peak.bandwidth / shares.get("bandwidth", 1), self.solve)


def price(
    name: str, reads: dict[str, list[Tensor]], writes: list[Tensor], flops: float = 0.0, tf32: bool = False
) -> Price:
    """The price of an ATen operation.

    name            like "aten.mm.out"
    reads, writes   argument name -> its tensors, without those that are only overwritten; results and what is changed in place
    flops           of matrix products and attention (torch.utils.flop_counter)
    tf32            what fp32 products are
    """
    op, first = name.split(".")[1], next(iter(reads.values()), [])
    if flops:
        precision = PRECISION.get(first[0].dtype, "fp32")
        precise = {"tf32" if precision == "fp32" and tf32 else precision: float(flops)}
        return Price("attention" if "attention" in op else "GEMM", name, moved(op, reads, writes), precise)
    if op.startswith(("_fused_adamw_", "_fused_adam_")):
        parameters, grads, first_moments, second = (
            size(*reads[part]) for part in ("self", "grads", "exp_avgs", "exp_avg_sqs")
        )
        return Price("AdamW", name, 2 * (parameters + first_moments + second) + grads)
    if op in SWEEPS:
        seconds = solve_seconds(first[0].shape[-1], SWEEPS[op])
        return Price("solves", name, moved(op, reads, writes), solve=seconds)
    if op in EIGENSOLVERS:
        return Price("solves", name, moved(op, reads, writes), why="no figure for its time, bytes only")
    return Price("copies" if op in COPIES else "other ATen", name, moved(op, reads, writes))


def moved(op: str, reads: dict[str, list[Tensor]], writes: list[Tensor]) -> int:
    """Bytes read plus bytes written; a source that is selected from counts as much as what is selected."""
    written, read = size(*writes), {name: size(*tensors) for name, tensors in reads.items()}
    source = SELECTS.get(op)
    if source in read:
        read[source] = min(read[source], written)
    return sum(read.values()) + written


def price_ours(name: str, cost: Cost) -> list[Price]:
    """The prices of an operator of ours: its own and those of the dense solves inside of it."""
    own = Price(cost.kind, name, cost.bytes, cost.flops)
    return [own, *(Price("solves", f"{name}: {op}", 0, solve=solve_seconds(n, SWEEPS[op])) for op, n in cost.solves)]


def price_inductor(name: str, arguments: list[Tensor], gb: float | None, flops: float) -> Price:
    """The price of a kernel that Inductor generated, from its own counts of GB and FLOPs."""
    if gb is None:
        return Price("Inductor", name, size(*arguments), why="Inductor gives no byte count, arguments once")
    if flops:  # a matrix template
        return Price("GEMM", name, gb * 1e9, {PRECISION.get(arguments[0].dtype, "fp32"): flops})
    return Price("Inductor", name, gb * 1e9)
