"""What this GPU reaches in a plain copy and plain matrix products, beside its data sheet: python -m bench.gpu.peaks."""

import argparse
import sys
from pathlib import Path

import torch

from bench.harness import PRODUCTS, reached
from bench.peaks import PEAKS, peak_of
from bench.records import RESULTS, append, heading
from bench.step.counts import pretend_gpu


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
    for name, rate in record["reached"].items():
        what, unit = name.split()
        sheet = record["data sheet"] and record["data sheet"][name]
        shown = "no time on a pretend GPU" if rate is None else f"{rate:.0f} {unit}"
        print(f"{what:5} {shown}, data sheet {'unknown' if sheet is None else f'{sheet:.0f} {unit}'}")
    append(record, Path(args.results))
    return 0


def measured() -> dict:
    """See bench.harness.reached; on a pretend GPU the work is done and no rate is told."""
    properties = torch.cuda.get_device_properties(0)
    rates: dict[str, float | None] = dict(reached(torch.device("cuda")))
    pretend = pretend_gpu() is not None
    if pretend:
        rates = dict.fromkeys(rates)
    return {
        **heading("pretend-h100" if pretend else properties.name),
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "reached": rates,
        "data sheet": _data_sheet("h100" if pretend else properties.name),
    }


def _data_sheet(name: str) -> dict[str, float] | None:
    try:
        peak = PEAKS[peak_of(name)]
    except ValueError:
        return None
    return {"copy GB/s": peak.bandwidth / 1e9} | {f"{name} TFLOP/s": peak.flops[name] / 1e12 for name in PRODUCTS}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
