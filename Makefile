# `make demo` and `make test` make .venv and install into it, once; `make gpu-check` installs nothing.
#
#   make demo                     generated faces → shards → a few minutes of pre-training → pictures, metrics, checkpoint
#   make demo DATA=my/faces       the same on a folder of your own images
#   make test                     lint, types, tests, but for those that take minutes
#   make test-slow                those: runs that are killed, a real Slurm, many ranks
#   make test-gpu                 those that need a GPU, on one
#   make gpu-check OUT=folder     the kernels' GPU tests and benchmark, on a machine with torch, triton, numpy and pytest
#
# Which torch: TORCH names the version, PIP_TORCH adds options to the one pip call that installs it. PyPI's wheel is the
# CUDA build; for a CPU-only machine pass PIP_TORCH="--index-url …" with the CPU index that pytorch.org names, which
# saves gigabytes. Anything from torch 2.10 on is accepted, also one that is installed in .venv already.

TORCH     ?= torch==2.13.0
PIP_TORCH ?=
DATA      ?=
OUT       ?=
VENV      ?= .venv

# The first Python on the path that the project runs on.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)

BIN   := $(VENV)/bin
# Two processes, a file's tests in one of them: many tests wait more than they work, Slurm's first of all.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint install gpu-check clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/python -m mcf.demo $(if $(DATA),data="$(DATA)") $(ARGS)

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

test-gpu: $(STAMP)
	MCF_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# kernels/ is imported as mcf.kernels, which mypy has to be shown.
	@mkdir -p build/types/mcf && touch build/types/mcf/__init__.py && ln -sfn ../../../kernels build/types/mcf/kernels
	MYPYPATH=build/types $(BIN)/mypy -p mcf.kernels

# With the Python of the path, and not the one of .venv: PYTHON=… names another.
gpu-check:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10–3.13 on the path; name one with PYTHON=…" >&2; exit 2; }
	@$(PYTHON) kernels/bench/gpu_check.py "$(OUT)"

install: $(STAMP)

# The order matters: torch first, so that nothing else chooses a build of it; then what DeepSpeed's setup.py imports;
# then DeepSpeed without build isolation, so that it sees that torch; then everything else, which must leave torch alone.
$(STAMP): setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10–3.13 on the path; name one with PYTHON=…" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade "pip>=24"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -qq $(PIP_TORCH) "$(TORCH)"
	$(BIN)/python -m pip install -qq "setuptools>=69" wheel packaging "numpy>=1.26,<3" ninja psutil py-cpuinfo
	$(BIN)/python -m pip install -qq --no-build-isolation "deepspeed>=0.19,<0.20"
	$(BIN)/python -m pip install -qq --no-build-isolation --editable ".[test]" \
		"torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	@touch $@

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
