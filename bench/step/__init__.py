"""python -m bench step: the roofline of one training step (bench/steps.py builds it).

trace.py      runs it once and prices every operation and every Inductor kernel
prices.py     a call -> the class it belongs to, bytes, FLOPs and the least time it can take; kernels/*/cost.py has our own
launches.py   what the host issues, from the simulated GPU's log or from torch's profiler
roofline.py   from the step to its record, and the record as text
"""
