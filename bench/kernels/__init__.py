"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes.

sizes.py       what the recipes make of a batch
case.py        one operation at one shape in one dtype: inputs, implementations, rivals
bench_OP.py    the cases of one operation
work.py        bytes and FLOPs of a case, from the contracts of bench/step
check.py       values and gradients against float64
cases.py       one case: check, then time, one record per implementation and direction
short.py       short calls by Triton's profiler Proton
suite.py       all cases asked for, the most important first
command.py     the command; supervisor.py: a process of its own on a GPU, so that a crash costs one case
table.py       records for people
test_suite.py  the same cases under pytest-benchmark: pytest bench --benchmark-only
"""
