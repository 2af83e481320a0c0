"""What this GPU reaches in a plain copy and a plain matrix product, beside its data sheet: python -m bench.gpu.peaks."""

import argparse
import sys
from pathlib import Path

import torch

from bench.records import RESULTS, append, heading
from bench.step.counts import measure, pretend_gpu
from bench.step.peaks import PEAKS, peak_of

COPIED = 2**30  # bytes
SIDE = 8192  # of the square matrices
ROUNDS = 20


def main(arguments: list[str]) -> int:
    """Print and append the record; returns the exit status: 0, or 2 with one line without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.peaks", description=__doc__.split(": ", 1)[0])
    default = str(RESULTS / "peaks.jsonl")
    parser.add_argument(
        "--results", default=default, metavar="FILE", help="JSON lines to append to (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench.gpu.peaks: error: device: no CUDA device here", file=sys.stderr)
        return 2
    record = measured()
    print(f"{record['device']}: {record['memory GiB']:.0f} GiB, {record['multiprocessors']} multiprocessors")
    for name, unit in (("copy GB/s", "GB/s"), ("bf16 TFLOP/s", "TFLOP/s")):
        reached, sheet = record["reached"][name], record["data sheet"] and record["data sheet"][name]
        shown = "no time on a pretend GPU" if reached is None else f"{reached:.0f} {unit}"
        print(f"{name.split()[0]:5} {shown}, data sheet {'unknown' if sheet is None else f'{sheet:.0f} {unit}'}")
    append(record, Path(args.results))
    return 0


def measured() -> dict:
    """Copies of 1 GiB (read plus written), bf16 products of side 8192 with random factors; median of 20."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for warm in (lambda: target.copy_(source), lambda: a @ b):
        warm()
    reached: dict[str, float | None] = {
        "copy GB/s": 2 * COPIED / measure(lambda: target.copy_(source), ROUNDS) / 1e6,
        "bf16 TFLOP/s": 2 * SIDE**3 / measure(lambda: a @ b, ROUNDS) / 1e9,
    }
    pretend = pretend_gpu() is not None
    if pretend:
        reached = dict.fromkeys(reached)
    return {
        **heading("pretend-h100" if pretend else properties.name),
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "reached": reached,
        "data sheet": _data_sheet("h100" if pretend else properties.name),
    }


def _data_sheet(name: str) -> dict[str, float] | None:
    try:
        peak = PEAKS[peak_of(name)]
    except ValueError:
        return None
    return {"copy GB/s": peak.bandwidth / 1e9, "bf16 TFLOP/s": peak.flops["bf16"] / 1e12}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
