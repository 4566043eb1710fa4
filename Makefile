# Each target sets up what it needs on a machine with Python 3.11 and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lower-bounds check bench bench-quality bench-frontier fuzz format clean

demo: $(READY)
	$(BIN)/halve demo

test: $(READY)
	$(BIN)/pytest -n auto -m "not slow"

# Tests with the oldest dependencies that pyproject.toml allows, in a separate virtual
# environment of several gigabytes, unless pip is configured for CPU builds of torch.
# PYTHON must be the oldest Python that it allows.
lower-bounds:
	$(PYTHON) tools/lower_bounds.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# One script a claim; see benchmarks/README.md. prune_speed.py makes a second virtual
# environment for its rival.
bench: $(READY)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/kernel_regression.py
	$(BIN)/python benchmarks/sparse_model.py
	$(BIN)/python benchmarks/prune_speed.py
	$(BIN)/python benchmarks/hostile.py

bench-quality: $(READY)
	$(BIN)/python benchmarks/quality.py

bench-frontier: $(READY)
	$(BIN)/python benchmarks/frontier.py

# Every reader of files from strangers in turn; needs atheris, which not every machine has
# a wheel of.
FUZZ_SECONDS ?= 600
READERS := safetensors index packed pickle config txt jsonl parquet record pack-record ledger
fuzz: $(READY)
	$(BIN)/pip install --quiet atheris
	for reader in $(READERS); do \
	  $(BIN)/python -m tests.fuzz $$reader --seconds $(FUZZ_SECONDS) || exit 1; \
	done

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lower-bounds build dist
