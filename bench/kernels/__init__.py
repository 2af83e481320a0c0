"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, under pytest-benchmark.

suite.py       which cases there are; bench_OP.py: those of one operation
case.py        one operation at one shape in one dtype: inputs, implementations, rivals, who is right, bytes and FLOPs
test_speed.py  one test per case, implementation and direction, timed by triton.testing on GPUs and by pytest-benchmark
conftest.py    its options and records, and who won
command.py     the command: starts pytest
"""
