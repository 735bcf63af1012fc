# Each target sets up what it needs in .venv, also from a fresh clone. Choose an interpreter with PYTHON=python3.12.

PYTHON ?= python3
# An index with CPU builds of torch, where pip's own has only builds with gigabytes of CUDA libraries.
TORCH_INDEX ?=
ARGS ?=
BENCH_ARGS ?= --size 2GiB --rounds 3

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([^"]*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test oldest check bench rig docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make demo    load a generated model with and without penstock, in about a minute'
	@echo 'make test    run all tests                   (ARGS="-k loader" for some)'
	@echo 'make oldest  the tests of adapters with the oldest transformers they are for, in .venv-oldest'
	@echo 'make check   ruff and mypy'
	@echo 'make bench   measure, in a short suite       (BENCH_ARGS="--size 6GiB --suite all" for all of it)'
	@echo 'make rig     NUMA nodes, NVMe drives, older kernels and power cuts, in virtual machines, in eleven minutes'
	@echo 'make docs    generate docs/cli.md'
	@echo 'make clean   remove .venv and all that tools have left'

# In a directory of its own, which git ignores: the demo draws a picture where it runs.
demo: $(VENV)/.installed
	@mkdir -p demo
	cd demo && ../$(BIN)/penstock demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/adapters $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.page_cache $(BENCH_ARGS)

# As root, for the packages that are missing and to mount what a power cut left.
rig: $(VENV)/.installed-rig
	$(BIN)/python -m rig $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python docs/generate_cli.py

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'penstock needs Python 3.11 or later, and $(PYTHON) is not: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

# What a user has, with plots: the demo needs no more.
$(VENV)/.installed: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[plot]'
	@touch $@

# torch first and by itself, so that its index is asked for nothing else.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet --editable '.[bench]' --group dev
	@touch $@ $(VENV)/.installed

$(OLDEST)/.installed: pyproject.toml $(VENV)/.made
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet \
		--editable . --group test 'accelerate>=1.0' 'transformers==$(TRANSFORMERS).*'
	@touch $@

# Without torch, which no test of the rig needs.
$(VENV)/.installed-rig: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable . --group rig
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
