"""The GPUs' limits.  All are dense peaks of the SXM boards from NVIDIA's data sheets: bounds, which no program reaches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One GPU: memory bandwidth [bytes/s], matrix FLOP/s by arithmetic, compute capability, memory [MiB], name, data sheet."""

    bandwidth: float
    flops: dict[str, float]
    arch: int
    memory_mib: int
    device: str
    source: str


# fp32: without tensor cores; fp64: with them
HOPPER = {"bf16": 989e12, "fp16": 989e12, "tf32": 494.5e12, "fp32": 67e12, "fp64": 67e12}
AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 19.5e12}
SHEET = "NVIDIA {} Tensor Core GPU data sheet, {}"
PEAKS = {
    "h100": Peak(3.35e12, HOPPER, 90, 81559, "NVIDIA H100 80GB HBM3", SHEET.format("H100", "SXM")),
    "h200": Peak(4.8e12, HOPPER, 90, 143771, "NVIDIA H200", SHEET.format("H200", "SXM")),
    "a100": Peak(2.04e12, AMPERE, 80, 81920, "NVIDIA A100-SXM4-80GB", SHEET.format("A100", "80 GB SXM")),
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
