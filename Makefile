# `make demo` and `make test` need Python 3.11 or newer and make; they build .venv on first use.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV ?= .venv
# An interpreter given from outside is used as it is; the default one is built by the rule for $(VENV)/.installed.
PYTHON ?= $(VENV)/bin/python
BASE_PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Asked for first and exactly: a range would let pip prefer a newer wheel with gigabytes of CUDA over a local CPU build.
TORCH ?= torch==2.13.0
WORKERS ?= 2

# The repository root must stay off sys.path: its `kernels` folder would pass for a package that transformers probes for.
export PYTHONSAFEPATH := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

ifeq ($(PYTHON),$(VENV)/bin/python)
READY := $(VENV)/.installed
endif

.PHONY: help demo test lint conformance bench accuracy train clean

help:
	@echo "make demo         compile the bundled model for a photo, print the table, write out/demo/"
	@echo "make test         linters, types and the tests"
	@echo "make conformance  every preset x family x target x input (hours; it goes on where it stopped)"
	@echo "make bench        dense, compiled and ideal side by side, written to benchmarks/results/"
	@echo "make accuracy     what every preset leaves of the bundled model's answers, written to benchmarks/results/"
	@echo "make train        trains the bundled model anew (about an hour on two cores)"

$(VENV)/.installed: pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found on PATH"; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(READY)
	$(PYTHON) examples/demo.py

# mypy follows folders, not the package map: it is shown the packages as they are installed, through links.
lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/tvc
	ln -s $(CURDIR)/tvc/* $(CURDIR)/kernels $(CURDIR)/passes $(CURDIR)/export build/typed/tvc/
	cd build/typed && $(abspath $(PYTHON)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# Two workers on two cores: one thread each.
test conformance: export OMP_NUM_THREADS ?= 1

test: lint $(READY)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

conformance: $(READY)
	$(PYTHON) tests/conformance/matrix.py
	$(PYTHON) tests/conformance/asked.py
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m conformance --deselect tests/conformance/test_matrix.py --deselect tests/conformance/test_random.py

bench: $(READY)
	$(PYTHON) benchmarks/run.py

accuracy: $(READY)
	$(PYTHON) benchmarks/accuracy.py

train: $(READY)
	$(PYTHON) examples/train_tiny_llava.py

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
