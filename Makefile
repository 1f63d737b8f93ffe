# `make demo` and `make test` do everything on a fresh machine: environment first, then the job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small models on two cores: one thread a process is fastest, and waiting threads must not spin.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-quick test slow lint format env clean

demo: $(VENV)/ready  ## train, align, merge and measure the embedded tiny world; writes runs/demo
	$(BIN)/paretune demo --out runs/demo

demo-quick: $(VENV)/ready  ## the same with few methods
	$(BIN)/paretune demo --quick --out runs/demo-quick

test: $(VENV)/ready  ## the default tests, about 5 minutes on 2 cores
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/ready  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(VENV)/ready

# torch first and pinned: a plain `pip install` could choose a build with several GB of CUDA packages.
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard src/paretune/native/*.[ch])
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paretune needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
