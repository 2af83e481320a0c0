"""python -m bench compile: every kernel compiled for A100 and H100, its machine code read (no GPU needed)."""

import argparse
import json

import torch
import triton

from bench import records
from mimir_fast.checkpoints.atomic import write_text_atomically
from tests.support import compiled as gate

EPILOG = """What is on record and has not changed is not compiled again; the table shows what is new or other code than before.
tests/kernels/test_compile.py says which of these facts are faults, and holds new code to the recorded table."""
COLUMNS = """op={op}; kernel={kernel}; config={config}; dtype={dtype}; arch={arch}; registers={registers}; shared bytes={shared}
spills={spills}; stack bytes={stack}; loads by bits={loads}; stores by bits={stores}; matrix={matrix}
occupancy={occupancy:.0%}; limited by={limit}"""


def build_parser() -> argparse.ArgumentParser:
    return records.parser("compile", __doc__, EPILOG)


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Print the table, write bench/results/compile.jsonl.  Raises ValueError for a flag: there is none."""
    if flags:
        raise ValueError(f"{flags[0]}: not a flag of compile")
    before, found = [row | {"key": ""} for row in gate.recorded()[0]], gate.compile_all(gate.OPS)
    print(records.table(COLUMNS, [row for row in found if row | {"key": ""} not in before]))
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    write_text_atomically(gate.TABLE, "".join(json.dumps(line) + "\n" for line in [versions, *found]), "results")
    print(f"{len(found)} kernels; {gate.TABLE.name} written")
    return 0
