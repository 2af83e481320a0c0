"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, under pytest-benchmark.

suite.py       which cases there are; bench_OP.py: those of one operation
case.py        one operation at one shape in one dtype: inputs, implementations, rivals, and who is right
work.py        bytes and FLOPs of a case, from the contracts of bench/step
test_speed.py  one test per case, implementation and direction, timed by triton.testing on GPUs and by pytest-benchmark
conftest.py    its options and records
command.py     the command: starts pytest, again where a crash or a lost GPU ended it
"""
