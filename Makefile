# Two commands for a fresh checkout: `make demo` and `make test`. Both make .venv and install what they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, a CPU build of torch; the CUDA build is several GB. Give PIP_ARGS for an index of your own.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
PIP_ARGS ?=
DEMO_DIR ?= demo-run
WORKERS ?= 2

.PHONY: install demo test test-slow lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(CONSTRAINTS) --editable '.[demo,dev]'
	touch $@

# Threads that wait asleep: on a machine with other work, spinning takes the core from the thread that is waited for.
demo test test-slow: export OMP_WAIT_POLICY ?= PASSIVE

demo: install
	$(BIN)/gist-fast demo --output-dir $(DEMO_DIR)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'slow and not gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/arrows.py

bench: install
	$(BIN)/python -m benchmarks.loss_cpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
