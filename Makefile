# Every target first sets up .venv, which needs Python 3.11 and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lower-bounds check bench bench-quality bench-frontier bench-real \
  bench-ranks bench-scale bench-all gpu fuzz docs format clean

demo: $(READY)
	$(BIN)/halve demo

test: $(READY)
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

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

# benchmarks/README.md lists the claims and the target that checks each.
# prune_speed.py creates a second virtual environment for its rival.
bench: $(READY)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/kernel_regression.py
	$(BIN)/python benchmarks/sparse_model.py
	$(BIN)/python benchmarks/prune_speed.py
	$(BIN)/python benchmarks/preparation.py
	$(BIN)/python benchmarks/hostile.py

bench-quality: $(READY)
	$(BIN)/python benchmarks/quality.py

# Builds llama.cpp, whose source and the model that both compress come from packages.
bench-frontier: $(READY)
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/pip install --quiet gguf
	$(BIN)/python benchmarks/llama_cpp.py --svg build/llama-cpp-bench/frontier.svg

bench-real: $(READY)
	$(BIN)/python benchmarks/real_model.py

bench-ranks: $(READY)
	$(BIN)/python benchmarks/ranks.py

bench-scale: $(READY)
	$(BIN)/python benchmarks/scale.py --config opt-175b --blocks 1 --samples 2 --limit 22

# Needs one NVIDIA GPU and a CUDA build of torch; eight minutes.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py gpu.json

bench-all: bench bench-quality bench-frontier bench-real bench-ranks bench-scale

# Fuzzes every parser of untrusted files in turn. Needs atheris, which has no wheel for
# some platforms.
FUZZ_SECONDS ?= 600
READERS := safetensors index packed compressed mxfp4 quantization-entry pickle \
  config txt jsonl parquet record pack-record ledger
fuzz: $(READY)
	$(BIN)/pip install --quiet atheris
	for reader in $(READERS); do \
	  $(BIN)/python -m tests.fuzz $$reader --seconds $(FUZZ_SECONDS) || exit 1; \
	done

# The site, in build/site; a broken link or an unknown name fails it.
docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp)
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lower-bounds $(VENV)-vllm build dist
