# make demo       install into .venv, then pre-train, fine-tune and attack small ViTs on handwritten digits (3 to 8 minutes, no GPU)
# make test       install into .venv and run every test, files on two processes
# make test-fast  the same without the tests marked slow
# make lint       ruff: rules and format
# make types      mypy
PYTHON ?= python3
VENV   := .venv
DEMO   := runs/demo

.PHONY: demo test test-fast lint types clean

demo: $(VENV)/.installed
	$(VENV)/bin/mimir-fast demo --output_dir $(DEMO)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

$(VENV)/.installed: setup.py pyproject.toml tests/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mimir_fast needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --constraint tests/constraints.txt --editable '.[dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
