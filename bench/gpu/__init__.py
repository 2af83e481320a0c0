"""python -m bench gpu: everything worth knowing about one GPU, in one go and within a time limit.

plan.py      the stages: which commands, what share of the time each
stages.py    runs one after another, each as a process of its own with a time limit
peaks.py     what this GPU reaches in a plain copy and a plain matrix product
summary.py   one page of Markdown, written anew after every stage
"""
