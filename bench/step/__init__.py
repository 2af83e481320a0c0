"""python -m bench step: the roofline of one training step (bench/steps.py builds it).

trace.py      runs it once and notes every operation and every Inductor kernel with its tensors
launches.py   launches, synchronisations and copies, from the simulated GPU's log or from the profiler
prices.py     a call -> the class it belongs to, bytes, FLOPs and the least time it can take
contracts.py  the same for our own operations, one formula each
roofline.py   from the step to its record; table.py prints it
"""
