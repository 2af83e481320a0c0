"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, under pytest-benchmark.

cases.py       a table: every operation's inputs at the sizes of the recipes; tests/support/cases.py says what a case is
rivals.py      implementations from elsewhere, and judges of operations that cannot keep to the usual error budget
test_speed.py  one test per case, implementation and direction, timed by triton.testing on GPUs and by pytest-benchmark
conftest.py    its options
command.py     the command: starts pytest
"""
