"""The study of docs/experiments.md: what it runs is data (plan.py), every result is a row of one file (results.py)."""
