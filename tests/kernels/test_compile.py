"""The compile gate: every kernel that can be launched, as machine code for A100 and H100."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mimir_fast import kernels as package
from mimir_fast.kernels._shared import column_sums
from mimir_fast.kernels.mlp.tiles import SIZES
from mimir_fast.kernels.short_attention.tiles import NARROW, ONE_BLOCK
from tests.support import compiled as gate
from tests.support.sass import SHARED_PER_BLOCK

DTYPES = ("bf16", "fp32", "uint8")
# At most so many where instructions and not memory set the time.  mlp: a thread has 128 numbers of a tile.
INSTRUCTIONS = {"_linear_gelu_kernel": 31 * 128, "_gelu_linear_grad_kernel": 34 * 128}

# The same of a warp: kernel and configuration -> how often its loop runs, and at most so many.
OF_A_WARP = {("_attend_long_grad_kernel", "T197 d8"): (13, 9_000), ("_attend_long_grad_kernel", "T197 d64"): (7, 7_500)}


@pytest.mark.slow
@pytest.mark.parametrize("op", gate.OPS)
def test_every_kernel_passes_the_gate(op):
    """No spills, stack or atomics; 128-bit accesses; shared memory fits; a dot means matrix instructions; INSTRUCTIONS.

    And no access is narrower than in the table of bench/results, where that is from the same compiler.  fp16, whose code is
    bf16's but for conversions, is left to the table: compiling takes long.  So is what has not changed since it was recorded.
    """
    records = gate.compile_all([op], DTYPES)
    assert {record["arch"] for record in records} == set(gate.ARCHS)
    failures = [
        (r["kernel"], r["config"], r["dtype"], r["arch"], *wrong) for r in records if (wrong := [*complaints(r)])
    ]
    assert not failures
    table, same_compiler = gate.recorded()
    if same_compiler:
        before = [r for r in table if r["op"] == op and r["dtype"] in DTYPES]
        assert [labels(r) for r in before] == [labels(r) for r in records], "out of date: python -m bench compile"
        assert not [labels(r) for r, then in zip(records, before) if narrower(r, then)]


def test_the_recorded_table_passes_the_gate():
    """fp16 too."""
    table, _ = gate.recorded()
    assert {r["dtype"] for r in table} > {"fp16"}
    for r in table:
        assert not list(complaints(r)), labels(r)


def test_every_choice_of_tile_sizes_is_in_the_table():
    recorded = {(r["config"].rpartition(" ")[2], r["arch"]) for r in gate.recorded()[0]}
    assert recorded >= {(name, 10 * generation) for generation, named in SIZES.items() for name in named}
    assert recorded >= {(name, arch) for name in (*ONE_BLOCK, *NARROW) for arch in gate.ARCHS}


def labels(record: dict) -> tuple:
    return tuple(record[name] for name in ("kernel", "config", "dtype", "arch"))


def narrower(record: dict, before: dict) -> bool:
    """Whether fewer global loads or stores than before are 128 bits wide, or more of them are not."""
    for name in ("loads", "stores"):
        now, then = record[name], before[name]
        narrow_now, narrow_then = (sum(widths.values()) - widths.get(128, 0) for widths in (now, then))
        if now.get(128, 0) < then.get(128, 0) or narrow_now > narrow_then:
            return True
    return False


def complaints(record: dict) -> Iterator[str]:
    """What is wrong with a compiled kernel; nothing, if it may be launched."""
    for name in ("spills", "stack", "atomics"):
        if record[name]:
            yield f"{name}: {record[name]}"
    if record["shared"] > SHARED_PER_BLOCK[record["arch"]]:
        yield f"shared: {record['shared']} bytes, {SHARED_PER_BLOCK[record['arch']]} are allowed"
    for name in ("loads", "stores"):
        if record["wide"] and max(record[name], default=0) < 128:
            yield f"{name}: expected 128 bits wide, got {record[name]}"
    if record["dot"] and not record["matrix"]:
        yield "matrix: a dot without matrix instructions"
    if record["instructions"] > INSTRUCTIONS.get(record["kernel"], record["instructions"]):
        yield f"instructions: {record['instructions']}, {INSTRUCTIONS[record['kernel']]} are allowed"
    if (key := (record["kernel"], record["config"])) in OF_A_WARP:
        passes, most = OF_A_WARP[key]
        if (executed := record["instructions"] + (passes - 1) * record["loop"]) > most:
            yield f"instructions: {executed} of a warp, {most} are allowed"
    if not record["occupancy"]:
        yield f"occupancy: no block fits, by {record['limit']}"


def test_narrower():
    before = {"loads": {128: 2, 32: 1}, "stores": {128: 1}}
    assert not narrower(before, before)
    assert not narrower({"loads": {128: 3}, "stores": {128: 1}}, before)
    assert narrower({"loads": {128: 1, 64: 2}, "stores": {128: 1}}, before)
    assert narrower({"loads": {128: 2, 32: 1}, "stores": {128: 1, 16: 1}}, before)


def test_every_kernel_of_an_operation_is_launched_by_its_launches():
    shared, used = kernels_of(column_sums), set()
    for op in gate.OPS:
        kernels = set()
        for path in (Path(package.__file__).parent / op).glob("[!_]*.py"):
            kernels |= kernels_of(gate.importlib.import_module(f"mimir_fast.kernels.{op}.{path.stem}"))
        launched = {variant.kernel for variant in gate.variants(op)}
        used |= launched & shared
        assert kernels == launched - shared, op
    assert used == shared


def test_every_launch_says_whether_multiply_adds_may_be_fused():
    """Triton's own default changes between versions."""
    said = {variant.kernel: variant.options.get("enable_fp_fusion") for op in gate.OPS for variant in gate.variants(op)}
    assert None not in said.values(), said
    assert [kernel for kernel, fused in said.items() if not fused] == ["_linf_start_kernel"]


def kernels_of(module) -> set[str]:
    return {n for n, k in vars(module).items() if isinstance(k, gate.JITFunction) and n.endswith("_kernel")}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spills": 2}, "spills"),
        ({"stack": 8}, "stack"),
        ({"atomics": 1}, "atomics"),
        ({"shared": 166913}, "shared"),
        ({"loads": {64: 4, 32: 1}}, "loads"),
        ({"stores": {}}, "stores"),
        ({"matrix": {}}, "matrix"),
        ({"instructions": 31 * 128 + 1}, "instructions"),
        ({"kernel": "_attend_long_grad_kernel", "instructions": 1801, "loop": 600}, "instructions"),
        ({"occupancy": 0.0}, "occupancy"),
    ],
)
def test_the_gate_complains(change, word):
    good = {"spills": 0, "stack": 0, "atomics": 0, "shared": 166912, "loads": {128: 1}, "stores": {128: 1}, "arch": 80}
    good |= {"wide": True, "dot": True, "matrix": {"HMMA.16816.F32": 4}, "occupancy": 0.5, "limit": "registers"}
    good |= {"kernel": "_linear_gelu_kernel", "config": "T197 d8", "instructions": 31 * 128}
    assert not list(complaints(good))
    (complaint,) = complaints(good | change)
    assert complaint.startswith(word)
