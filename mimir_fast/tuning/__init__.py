"""Measured choice of implementations: what `auto` means on a GPU, and with --compile on a CPU.

    Problem      an attention or an MLP of this run, by its sizes and dtype (records.py); found by following a step on
                 fake tensors (problems.py)
    Candidate    an implementation of it and, for kernels of ours, named tile sizes (candidates.py)
    Trial        what became of a candidate: its time, or why it is out (measuring.py)
    Choice       problem and candidate; a run's choices are one line of text, which is the resolved value of --tune

A run asks `decide` (decisions.py) once, after the model is there and before anything is compiled or captured.  A resumed run
goes on with its checkpoint's choices.  Else rank 0 reads what was measured before (remembered.py), measures what is missing
within a time box, and tells all ranks; the choices are written into the model's modules and, for tiles, beside the launchers.

Measured is the forward pass with its backward pass, of the sizes and dtype of this run.  Every candidate is first held against
the reference in float64 (budget.py); a wrong one is out, and said to be.  Then all are timed in interleaved rounds, on CUDA as
CUDA graphs with a cold L2 cache (timers.py), and compared by their medians; of those within TIE of the fastest the first in
the candidates' order is taken, so that noise does not choose between equals.

triton.autotune was looked at: it compares with nothing, measures at the first call (which may be inside of a capture) and in
every process for itself, and knows kernels of Triton only.
"""
