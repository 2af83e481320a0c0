"""python -m bench report: tables and plots from the records.

rows of records (bench/rows.py) -> figures.py: what a table may show -> tables.py, field.py: Markdown, plots.py: SVG
-> command.py: written between the markers of README.md and docs/performance.md, or compared with what is there
"""
