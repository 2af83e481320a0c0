"""From a call to its price: the class it belongs to, the bytes and FLOPs it cannot avoid, and what that takes at best."""

from dataclasses import dataclass, field

from bench.peaks import Peak, solve_seconds
from bench.step.contracts import CONTRACTS
from bench.step.trace import Call

CLASSES = ("Inductor", "GEMM", "attention", "ours", "AdamW", "solves", "copies", "other ATen")
PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
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
    file: str = ""

    def seconds(self, peak: Peak) -> float:
        """max(FLOPs / peak, bytes / bandwidth, solve): no implementation of this call can be faster."""
        compute = sum(count / peak.flops[precision] for precision, count in self.flops.items())
        return max(compute, self.bytes / peak.bandwidth, self.solve)


def price(call: Call, tf32: bool = False) -> list[Price]:
    """The prices of one call, more than one where it does things of different classes.  tf32: what fp32 products are."""
    if call.kind == "inductor":
        return [_inductor(call)]
    if call.name.startswith("mimir_fast."):
        return _ours(call)
    if call.flops:
        factors = next(iter(call.reads.values()))[0].dtype
        precision = PRECISION.get(factors, "fp32")
        flops = {"tf32" if precision == "fp32" and tf32 else precision: float(call.flops)}
        return [Price("attention" if "attention" in call.op else "GEMM", call.name, moved(call), flops)]
    if call.op.startswith(("_fused_adamw_", "_fused_adam_")):
        parts = {name: total(call, name) for name in ("self", "grads", "exp_avgs", "exp_avg_sqs")}
        return [Price("AdamW", call.name, 2 * sum(parts.values()) - parts["grads"])]
    if call.op in SWEEPS:
        n = next(iter(call.reads.values()))[0].shape[-1]
        return [Price("solves", call.name, moved(call), solve=solve_seconds(n, SWEEPS[call.op]))]
    if call.op in EIGENSOLVERS:
        return [Price("solves", call.name, moved(call), why="no figure for its time, bytes only")]
    return [Price("copies" if call.op in COPIES else "other ATen", call.name, moved(call))]


def total(call: Call, name: str) -> int:
    """Bytes of an argument's tensors."""
    return sum(spec.bytes for spec in call.reads.get(name, []))


def moved(call: Call) -> int:
    """Bytes read plus bytes written; a source that is selected from counts as much as what is selected."""
    written = sum(spec.bytes for spec in call.writes)
    reads = {name: total(call, name) for name in call.reads}
    source = SELECTS.get(call.op)
    if source in reads:
        reads[source] = min(reads[source], written)
    return sum(reads.values()) + written


def _inductor(call: Call) -> Price:
    if call.gb is None:
        why = "Inductor gives no byte count, arguments once"
        return Price("Inductor", call.name, moved(call), why=why, file=call.file)
    if call.flops:  # a matrix template
        precision = PRECISION.get(call.read("arguments").dtype, "fp32")
        return Price("GEMM", call.name, call.gb * 1e9, {precision: call.flops}, file=call.file)
    return Price("Inductor", call.name, call.gb * 1e9, file=call.file)


def _ours(call: Call) -> list[Price]:
    if call.op not in CONTRACTS:
        return [Price("ours", call.name, moved(call), why="no contract in bench/step/contracts.py, arguments once")]
    contract = CONTRACTS[call.op](call)
    prices = [Price(contract.kind, call.name, contract.bytes, contract.flops)]
    for name, n in contract.solves:
        prices.append(Price("solves", f"{call.name}: {name}", 0, solve=solve_seconds(n, SWEEPS[name])))
    return prices
