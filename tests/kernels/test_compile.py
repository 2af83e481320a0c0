"""The compile gate: every kernel that can be launched, as machine code for A100 and H100."""

from pathlib import Path

import pytest

from bench import compile as gate
from mimir_fast import kernels as package


@pytest.mark.parametrize("op", gate.OPS)
def test_every_kernel_passes_the_gate(op):
    """No spills, stack or atomics; 128-bit loads and stores; shared memory fits; a dot means matrix instructions."""
    records = gate.compile_all([op])
    assert {record["arch"] for record in records} == set(gate.ARCHS)
    failures = [
        (r["kernel"], r["config"], r["dtype"], r["arch"], *wrong) for r in records if (wrong := [*gate.complaints(r)])
    ]
    assert not failures


def test_every_kernel_of_an_operation_is_launched_by_its_launches():
    for op in gate.OPS:
        kernels = set()
        for path in (Path(package.__file__).parent / op).glob("[!_]*.py"):
            module = gate.importlib.import_module(f"mimir_fast.kernels.{op}.{path.stem}")
            kernels |= {n for n, k in vars(module).items() if isinstance(k, gate.JITFunction) and n.endswith("_kernel")}
        assert kernels == {variant.kernel for variant in gate.variants(op)}, op


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
        ({"occupancy": 0.0}, "occupancy"),
    ],
)
def test_the_gate_complains(change, word):
    good = {"spills": 0, "stack": 0, "atomics": 0, "shared": 166912, "loads": {128: 1}, "stores": {128: 1}, "arch": 80}
    good |= {"wide": True, "dot": True, "matrix": {"HMMA.16816.F32": 4}, "occupancy": 0.5, "limit": "registers"}
    assert not list(gate.complaints(good))
    (complaint,) = gate.complaints(good | change)
    assert complaint.startswith(word)
