"""The GPUs' limits.  All are dense peaks of the SXM boards from NVIDIA's data sheets: bounds, which no program reaches.

Beside them stands what programs reach: shares of the peaks, from publications, and estimates for what is our own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One GPU: memory bandwidth [bytes/s], matrix FLOP/s by arithmetic, compute capability, memory [MiB], name, data sheet;
    shares of the peaks that programs reach, and where these are from."""

    bandwidth: float
    flops: dict[str, float]
    arch: int
    memory_mib: int
    device: str
    source: str
    reached: dict[str, float]
    reached_source: str


# fp32: without tensor cores; fp64: with them
HOPPER = {"bf16": 989e12, "fp16": 989e12, "tf32": 494.5e12, "fp32": 67e12, "fp64": 67e12}
AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 19.5e12}
SHEET = "NVIDIA {} Tensor Core GPU data sheet, {}"
# of bandwidth, and of FLOP/s by class of call; own: Triton's.  short_attention waits for exponentials, nhsic for instructions
ON_HOPPER = {"bandwidth": 0.88, "GEMM": 0.6, "own GEMM": 0.5, "attention": 0.35, "own attention": 0.08, "ours": 0.4}
ON_AMPERE = {"bandwidth": 0.88, "GEMM": 0.8, "own GEMM": 0.65, "attention": 0.6, "own attention": 0.2, "ours": 0.4}
SHARES = "88% of bandwidth (NVIDIA forum 339083); cuBLAS {} (attention {}); our kernels' shares are estimates"
HOPPER_SHARES = SHARES.format("60% at K of 512 and 1024 (Triton's Gluon tutorial 07)", "35%, arXiv 2407.08608")
AMPERE_SHARES = SHARES.format("80%, the least of 80 to 90%", "60%, of 50 to 73%; both arXiv 2307.08691")
GAP_SECONDS = 1.1e-6  # from one launch in a CUDA graph to the next: an estimate
H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
PEAKS = {
    "h100": Peak(3.35e12, HOPPER, 90, 81559, H100, SHEET.format("H100", "SXM"), ON_HOPPER, HOPPER_SHARES),
    "h200": Peak(4.8e12, HOPPER, 90, 143771, H200, SHEET.format("H200", "SXM"), ON_HOPPER, HOPPER_SHARES),
    "a100": Peak(2.04e12, AMPERE, 80, 81920, A100, SHEET.format("A100", "80 GB SXM"), ON_AMPERE, AMPERE_SHARES),
}

# cuSOLVER's published time for one 512 x 512 fp32 Cholesky factorisation on an H100-class GPU.  Its 45 MFLOP would take
# 0.7 us at the fp32 peak: what is measured is the chain of dependent panels, so the figure is scaled by the length of that
# chain (rows, sweeps over the matrix), whatever the precision, and is used for the A100 too.
CHOLESKY_512_SECONDS = 0.38e-3


def solve_seconds(n: int, sweeps: int) -> float:
    """Time of `sweeps` passes along the diagonal of an n x n matrix: factorisation 1, forward plus backward solve 2."""
    return CHOLESKY_512_SECONDS * sweeps * n / 512


def peak_of(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100".  Raises ValueError for a GPU whose peaks are not in the table."""
    for known in PEAKS:
        if known in name.lower():
            return known
    raise ValueError(f"gpu: the peaks of {name!r} are not known; choose those of one of {', '.join(PEAKS)} with --gpu")
