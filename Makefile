# Two commands, each does its own set-up in .venv:
#   make demo   sample a shipped model full and fast, and write demo/report.html
#   make test   run every test that needs no accelerator
# docs/development.md has the rest.

PYTHON ?= python3
VENV ?= .venv
EVAL_VENV ?= .venv-eval
# One version for everyone. A newer torch works too: make test TORCH_VERSION=...
TORCH_VERSION ?= 2.13.0
WORKERS ?= 2

BIN := $(VENV)/bin
SOURCES := pipelines uem kernels eval

.DEFAULT_GOAL := help
.PHONY: help demo test test-eval lint typing-tree

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/fastdiff demo --out demo

# One thread per worker: two workers with a thread pool each would fight for the cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal $(ARGS)

# What agrees with clean-fid and torch-fidelity: these need torchvision, which has CUDA builds only (about 6 GB).
test-eval: $(EVAL_VENV)/.installed
	OMP_NUM_THREADS=1 $(EVAL_VENV)/bin/python -m pytest -m "not gpu and not slow" -n $(WORKERS) tests/eval $(ARGS)

lint: $(VENV)/.installed-dev typing-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .typing && $(abspath $(BIN))/mypy -p fastdiff --config-file ../pyproject.toml --cache-dir ../.mypy_cache

# The package as it looks once installed, so that mypy and editors see the folders under their import names.
typing-tree:
	@rm -rf .typing && mkdir -p .typing/fastdiff
	@for path in fastdiff/* $(SOURCES); do ln -s "../../$$path" .typing/fastdiff/; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: where a CPU build of this version is on offer, nothing later replaces it by gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

# torchvision fits no CPU build of torch, so both are taken together.
$(EVAL_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install torch torchvision
	$(EVAL_VENV)/bin/python -m pip install -e ".[dev,eval]"
	@touch $@
