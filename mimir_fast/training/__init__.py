"""The training loop, what a step computes with, and the two kinds of training."""
