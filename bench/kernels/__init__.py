"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, under pytest-benchmark.

suite.py       which cases there are; bench_OP.py: those of one operation
case.py        a case that is timed: its implementations, bytes and FLOPs; tests/support/cases.py says what a case is
test_speed.py  one test per case, implementation and direction, timed by triton.testing on GPUs and by pytest-benchmark
conftest.py    its options and records
command.py     the command: starts pytest
"""
