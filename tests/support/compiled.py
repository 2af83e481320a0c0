"""Every kernel that the operations can launch, compiled for A100 and H100, its machine code read.

No GPU is needed.  What is compiled is what is launched: the operations' `launches()` call the real launchers on tensors without
data, each kernel call is recorded with the argument types, divisibilities and constants that Triton itself would see, and
compiled.
"""

import hashlib
import importlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.support.sass import read

ARCHS = (80, 90)  # A100, H100
ROOT = Path(__file__).parents[2]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/kernel.py"))
TABLE = ROOT / "bench" / "results" / "compile.jsonl"


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch specialises it; everything in it can be pickled."""

    op: str
    kernel: str
    config: str
    dtype: str
    wide: bool  # 16-byte global loads and stores are expected
    archs: tuple[int, ...] = field(repr=False)
    module: str = field(repr=False)
    signature: dict = field(repr=False)
    constants: dict = field(repr=False)
    attributes: dict = field(repr=False)
    options: dict = field(repr=False)


def variants(op: str) -> list[Variant]:
    """Every distinct kernel variant that an operation's `launches()` launch."""
    found: dict[str, Variant] = {}
    for launch in importlib.import_module(f"mimir_fast.kernels.{op}.kernel").launches():
        for kernel, arguments, options in _recorded(launch.call):
            wide = kernel.__name__ not in launch.narrow
            source = _source(kernel, arguments)
            key = repr((kernel.__name__, *source, options, launch.archs))
            label = (op, kernel.__name__, launch.config, launch.dtype, wide, launch.archs, kernel.__module__)
            found.setdefault(key, Variant(*label, *source, options))
    return list(found.values())


def _recorded(call) -> list[tuple[JITFunction, dict, dict]]:
    """(kernel, arguments by name, options such as num_warps) of every launch during `call`, none of which runs."""
    calls = []

    def record(kernel, *args, grid, warmup=False, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        calls.append((kernel, dict(zip(kernel.arg_names, args)) | kwargs, options))

    with patch.object(JITFunction, "run", record):
        call()
    return calls


def _source(kernel: JITFunction, arguments: dict) -> tuple[dict, dict, dict]:
    """signature, constants and attributes as Triton derives them when it launches the kernel with these arguments."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        kind, key = native_specialize_impl(BaseBackend, value, False, True, True)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = key
        elif key and "D" in key:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def source_of(variant: Variant) -> ASTSource:
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    return ASTSource(kernel, variant.signature, variant.constants, variant.attributes)


def label(variant: Variant, arch: int) -> dict:
    """What a record says of it before it is compiled; key: by Triton's own hash, which holds the text of all that it calls."""
    found = {name: getattr(variant, name) for name in ("op", "kernel", "config", "dtype", "wide")}
    options = sorted(variant.options.items())
    key = hashlib.sha256(repr((source_of(variant).hash(), options, arch)).encode()).hexdigest()[:16]
    return {**found, "arch": arch, "key": key}


def compiled(variant: Variant, arch: int) -> dict:
    """The facts of one variant on one architecture."""
    binary = triton.compile(source_of(variant), target=GPUTarget("cuda", arch, 32), options=variant.options)
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    facts = read(binary.asm["cubin"], warps, arch, shared)
    return {"warps": warps, "dot": "tt.dot" in binary.asm["ttir"], **facts}


def recorded() -> tuple[list[dict], bool]:
    """The records of bench/results/compile.jsonl, and whether they are this compiler's."""
    versions, *rows = map(json.loads, TABLE.read_text().splitlines())
    for row in rows:
        row |= {name: {int(width): count for width, count in row[name].items()} for name in ("loads", "stores")}
    return rows, versions["triton"] == triton.__version__


def compile_all(ops: list[str], dtypes: tuple[str, ...] | None = None, processes: int = 2) -> list[dict]:
    """Records of every variant of these operations on every architecture; dtypes: only those of these, None: all.

    The same source compiled by the same compiler is the same code: what is on record is not compiled again.
    """
    chosen = [v for op in ops for v in variants(op) if dtypes is None or v.dtype in dtypes]
    jobs = [(variant, arch) for variant in chosen for arch in variant.archs]
    labels, (table, same) = [label(*job) for job in jobs], recorded()
    known = {row["key"]: row for row in table if same and "key" in row}
    if new := [job for job, found in zip(jobs, labels) if found["key"] not in known]:
        with ProcessPoolExecutor(processes) as pool:
            facts = pool.map(compiled, *zip(*new), chunksize=4)
            known |= {label(*job)["key"]: found for job, found in zip(new, facts)}
    return [found | known[found["key"]] | found for found in labels]
