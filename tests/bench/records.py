"""Records as the benchmarks write them, with the figures that a test wants."""

from bench.step.pricing import CLASSES
from mimir_fast.config.pretraining import PretrainConfig

H100 = "NVIDIA H100 80GB HBM3"
HEAD = {
    "date": "2026-11-23T06:42:18+00:00",
    "commit": "a1",
    "torch": "2",
    "triton": "3",
    "python": "3.11",
    "driver": "13.0",
}


TRAINER = PretrainConfig().flat() | {"model": "mae_vit_base", "batch_size": 512, "patch_size": 16, "input_size": 224}
TRAINER |= {"precision": "bf16", "compile": True}


def kernel(ms: float, low: float | None = None, high: float | None = None, **fields) -> dict:
    case = {
        "op": "mlp",
        "recipe": "imagenet_vit_b encoder",
        "config": {"B": 512, "D": 768},
        "dtype": "bf16",
        "direction": "forward",
        "impl": "ours",
    }
    return {"kind": "kernels", **HEAD, "device": H100, **case, "ms": ms, "ms_p20": low, "ms_p80": high, **fields}


def step(bound: float = 40.0, ms: float | None = None, **fields) -> dict:
    """Priced on a pretend H100, or measured on a real one; the bound is in the classes as half products, half solves."""
    nothing = {"count": 0, "gb": 0.0, "tflop": 0.0, "bound_ms": 0.0}
    classes = dict.fromkeys(CLASSES, nothing)
    classes["GEMM"] = {"count": 2, "gb": 50.0, "tflop": 20.0, "bound_ms": bound / 2}
    classes["solves"] = nothing | {"bound_ms": bound / 2}
    totals = {"kernels": 480, "gemms": 238, "memsets": 1, "syncs": 0, "to_host": 0, "launches": 719, "gb": 90.0}
    totals |= {"gb_outside_gemm_attention": 40.0, "gemm_tflop": 20.0, "peak_gib": 10.0}
    totals |= {"bound_ms": bound, "bound_without_solves_ms": bound / 2}
    measured = None if ms is None else {"ms": ms, "images_per_s": 512e3 / ms, "mfu": 0.3, "share_of_bound": bound / ms}
    device = "pretend-h100" if ms is None else H100
    own = {"variant": "ours", "peaks": "h100", "config": TRAINER, "classes": classes, "totals": totals}
    return {**HEAD, "device": device, **own, "ours": {"nhsic": nothing}, "measured": measured, **fields}


def pairs(ratios: list[float], rate: float = 100.0, **fields) -> dict:
    config = {
        "model": "mae_vit_ti",
        "input_size": 32,
        "patch_size": 4,
        "batch_size": 32,
        "rounds": len(ratios),
        "compile": False,
    }
    rates = {"mimir_fast": rate, "textbook": 50.0}
    ratio = sorted(ratios)[len(ratios) // 2]
    own = {"threads": 2, "config": config, "images/s": rates, "ratio": ratio, "ratios": ratios}
    return {**HEAD, "device": "cpu", **own, **fields}


def training(rate: float, fast: float, slow: float, **fields) -> dict:
    """fast, slow: percentiles of an update's seconds; 128 images each."""
    config = TRAINER | {"batch_size": 64, "accum_iter": 2}
    cuts = {"20": fast, "80": slow}
    own = {"threads": 2, "peaks": None, "config": config, "images/s": rate, "percentiles": cuts, "peak GiB": 1.0}
    return {**HEAD, "device": "cpu", **own, "mfu": None, "data wait": 0.1, "stages": {"attack": 1.0}, **fields}


def losses(*ends: float, **fields) -> dict:
    """fp32 runs, one per seed, that end at these losses; bf16 as the first of them."""
    points = {"fp32": [[1.0, end] for end in ends], "bf16": [[1.0, ends[0]]]}
    spread = {"seed to seed": {"largest": 0.1, "mean": 0.05}, "bf16": {"largest": 0.03, "mean": 0.01}}
    return {**HEAD, "device": "cpu", "flags": ["--lr", "1"], "window": 20, "points": points, **spread, **fields}
