"""python -m bench step: the roofline of one training step.

variants.py   the step of each variant, built as the trainer builds it; finetuning.py: that of fine-tuning
trace.py      runs it once and notes every operation and every Inductor kernel with its tensors
counts.py     launches, synchronisations and copies, from the pretend GPU's log or from the profiler
pricing.py    a call -> the class it belongs to, bytes, FLOPs and the least time it can take
contracts.py  the same for our own operations, one formula each
peaks.py      what the GPUs can do at most
table.py      rows, totals, the printed table and the JSON record
"""
