# Targets: demo, checkpoint, test, lint, bench, kernels-check, clean, help. Each sets up .venv on a fresh machine; the stamps in it say what is done.
# All paths are relative, so that the repository may lie anywhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

NATIVE_SOURCES := CMakeLists.txt dfengine/sources.py setup.py pyproject.toml constraints.txt dfengine/_version.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
TEST_SECONDS ?= 1500
TEST_ARGUMENTS ?=

unexport VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo checkpoint test lint bench kernels-check clean

help:
	@echo 'make demo           render test images, detect, evaluate, write a report'
	@echo 'make checkpoint     train the checkpoint of the demo anew (70 minutes)'
	@echo 'make test           run the tests (TEST_ARGUMENTS="-k ingest" for some)'
	@echo 'make lint           ruff'
	@echo 'make bench          time the kernels on this CPU, into bench/results'
	@echo 'make kernels-check  compile the GPU kernels offline; registers and spills'
	@echo 'make clean          remove .venv and everything built'

demo: $(VENV)/installed
	@$(BIN)/dfengine demo

checkpoint: $(VENV)/installed
	@bench/demo_checkpoint.sh

# Two workers with a thread each: two with two wait for each other.
test: $(VENV)/installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} timeout --kill-after=30 $(TEST_SECONDS) $(BIN)/python -m pytest -q -n 2 --dist=worksteal $(TEST_ARGUMENTS); status=$$?; \
	if [ $$status -eq 124 ]; then echo "make test: stopped after $(TEST_SECONDS) seconds"; fi; exit $$status

lint: $(VENV)/installed
	@$(BIN)/ruff check .

bench: $(VENV)/installed
	@$(BIN)/python bench/kernels.py --device cpu

kernels-check: $(VENV)/installed
	@$(BIN)/python bench/kernels_check.py --json build/kernels-check.json

# torch goes in first and alone, so that the build that pip finds is kept; TORCH_INDEX names another package index (a CPU-only one, say).
$(VENV)/torch: | $(VENV)/bin/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	{ echo 'installing torch ...'; $(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'; }
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or later is needed'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'python -m venv failed: install it with "apt install python3-venv"'; exit 1; }

$(VENV)/installed: $(NATIVE_SOURCES) $(VENV)/torch
	@echo 'installing dfengine ...'
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'from dfengine import native; print(native.status())'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dfengine/_native*.so dfengine/_native_missing.txt .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
