"""From a call to its price: the class it belongs to, the bytes and FLOPs it cannot avoid, and what that takes at best."""

from dataclasses import dataclass, field

from bench.peaks import Peak, solve_seconds
from bench.step.contracts import CONTRACTS
from bench.step.trace import Call, Spec

CLASSES = ("Inductor", "GEMM", "attention", "ours", "AdamW", "solves", "copies", "other ATen")
PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}

# the two factors of a product, by operation
FACTORS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
}
CONVOLUTIONS = ("convolution", "convolution_backward")
ATTENTION = {f"_scaled_dot_product_{name}_attention" for name in ("flash", "efficient", "cudnn")}
BACKWARD_PER_FORWARD = 2.5  # five products instead of two
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


@dataclass(frozen=True)
class Setting:
    """What the tensors do not tell: fp32 products as tf32 or not."""

    tf32: bool = False


def price(call: Call, setting: Setting) -> list[Price]:
    """The prices of one call; more than one where it does things of different classes."""
    if call.kind == "inductor":
        return [_inductor(call)]
    if call.name.startswith("mimir_fast."):
        return _ours(call, setting)
    if call.op in FACTORS:
        return [Price("GEMM", call.name, moved(call), _product(call, setting))]
    if call.op in CONVOLUTIONS:
        return [Price("GEMM", call.name, moved(call), _convolution(call, setting))]
    if call.op.removesuffix("_backward") in ATTENTION:
        return [Price("attention", call.name, moved(call), _attention(call, setting))]
    if call.op.startswith(("_fused_adamw_", "_fused_adam_")):
        parts = {name: total(call.reads.get(name, [])) for name in ("self", "grads", "exp_avgs", "exp_avg_sqs")}
        return [Price("AdamW", call.name, 2 * sum(parts.values()) - parts["grads"])]
    if call.op in SWEEPS:
        n = next(iter(call.reads.values()))[0].shape[-1]
        return [Price("solves", call.name, moved(call), solve=solve_seconds(n, SWEEPS[call.op]))]
    if call.op in EIGENSOLVERS:
        return [Price("solves", call.name, moved(call), why="no figure for its time, bytes only")]
    return [Price("copies" if call.op in COPIES else "other ATen", call.name, moved(call))]


def total(specs: list[Spec]) -> int:
    return sum(spec.bytes for spec in specs)


def moved(call: Call) -> int:
    """Bytes read plus bytes written; a source that is selected from counts as much as what is selected."""
    written = total(call.writes)
    reads = {name: total(specs) for name, specs in call.reads.items()}
    source = SELECTS.get(call.op)
    if source in reads:
        reads[source] = min(reads[source], written)
    return sum(reads.values()) + written


def _inductor(call: Call) -> Price:
    if call.gb is None:
        return Price(
            "Inductor", call.name, moved(call), why="Inductor gives no byte count, arguments once", file=call.file
        )
    if call.flop:  # a matrix template
        precision = PRECISION.get(call.reads["arguments"][0].dtype, "fp32")
        return Price("GEMM", call.name, call.gb * 1e9, {precision: call.flop}, file=call.file)
    return Price("Inductor", call.name, call.gb * 1e9, file=call.file)


def _ours(call: Call, setting: Setting) -> list[Price]:
    if call.op not in CONTRACTS:
        return [Price("ours", call.name, moved(call), why="no contract in bench/step/contracts.py, arguments once")]
    contract = CONTRACTS[call.op](call)
    prices = [Price(contract.kind, call.name, contract.bytes, contract.flops)]
    for name, n in contract.solves:
        prices.append(Price("solves", f"{call.name}: {name}", 0, solve=solve_seconds(n, SWEEPS[name])))
    return prices


def _precision(spec: Spec, setting: Setting) -> str:
    precision = PRECISION.get(spec.dtype, "fp32")
    return "tf32" if precision == "fp32" and setting.tf32 else precision


def _product(call: Call, setting: Setting) -> dict[str, float]:
    """2 m n k (per matrix of a batch)."""
    left, right = (call.read(name) for name in FACTORS[call.op])
    columns = right.shape[-1] if len(right.shape) > 1 else 1
    return {_precision(left, setting): 2.0 * _numel(left) * columns}


def convolution_products(call: Call) -> int:
    """Forward one; backward one for each wanted gradient of input and weight."""
    if call.op == "convolution":
        return 1
    wanted = [call.read("input").shape, call.read("weight").shape]
    return sum(spec.shape in wanted for spec in call.writes)


def _convolution(call: Call, setting: Setting) -> dict[str, float]:
    """2 * (numbers of the output) * (numbers of one filter) per product."""
    weight = call.read("weight")
    output = call.writes[0] if call.op == "convolution" else call.read("grad_output")
    products = convolution_products(call)
    return {_precision(weight, setting): 2.0 * products * _numel(output) * _numel(weight) / weight.shape[0]}


def _attention(call: Call, setting: Setting) -> dict[str, float]:
    """4 B N T S d forward, 2.5 times that backward."""
    query, key = call.read("query"), call.read("key")
    forward = 4.0 * _numel(query) * key.shape[2]
    return {_precision(query, setting): forward * (BACKWARD_PER_FORWARD if call.op.endswith("_backward") else 1)}


def _numel(spec: Spec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count
