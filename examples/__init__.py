"""Examples; `python -m examples.study` runs the study from the root of a checkout."""
