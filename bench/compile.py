"""python -m bench compile: every kernel compiled for A100 and H100, its machine code read (no GPU needed)."""

import argparse
import json
from collections.abc import Iterator

import torch
import triton

from bench import records
from mimir_fast.checkpoints.atomic import write_text_atomically
from tests.support import compiled as gate

EPILOG = "tests/kernels/test_compile.py says which of these facts are faults, and holds new code to the recorded table."


def build_parser() -> argparse.ArgumentParser:
    return records.parser("compile", __doc__, EPILOG)


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Print the table, write bench/results/compile.jsonl.  Raises ValueError for a flag: there is none."""
    if flags:
        raise ValueError(f"{flags[0]}: not a flag of compile")
    found = gate.compile_all(gate.OPS)
    print(*table(found), sep="\n")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    write_text_atomically(gate.TABLE, "".join(json.dumps(line) + "\n" for line in [versions, *found]), "results")
    print(f"{len(found)} kernels compiled; {gate.TABLE.name} written")
    return 0


def table(records: list[dict]) -> Iterator[str]:
    """Lines of a table, one per record."""
    columns = "{:18} {:24} {:22} {:5} {:>4} {:>4} {:>6} {:>6} {:>5} {:>16} {:>16} {:>10} {:>5} {}".format
    head = "op kernel config dtype arch regs shared spills stack loads stores matrix occ limit"
    yield columns(*head.split())
    for r in records:
        loads, stores = (
            " ".join(f"{n}x{width}" for width, n in r[name].items()) or "-" for name in ("loads", "stores")
        )
        matrix = " ".join(sorted({name.split(".")[0] for name in r["matrix"]})) or "-"
        numbers = (r["arch"], r["registers"], r["shared"], r["spills"], r["stack"])
        labels = (r["op"], r["kernel"], r["config"], r["dtype"])
        yield columns(*labels, *numbers, loads, stores, matrix, f"{r['occupancy']:.0%}", r["limit"])
