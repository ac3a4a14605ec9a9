# Everything a developer runs. `make demo` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
OUT ?= demo_output

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-tpu lint format bench bench-peers bench-full

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv and install the project with all that tests and demo need

# The stamp is newer than both files exactly when the last installation finished after their last change.
$(STAMP): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is required, got {v.major}.{v.minor}: run make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt setuptools
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt \
		--no-build-isolation --editable '.[all,dev]'
	touch $@

demo: $(STAMP) ## Compile and run the computer-use canvas on real pixels; pictures and report in demo_output/
	$(VENV)/bin/canvas-engineering run examples/canvases/computer_use.json --out $(OUT)

# One thread per worker: the workers already use the cores.
test: $(STAMP) ## Run the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal --quiet $(ARGS)

# jax[tpu] names the libtpu that belongs to the installed JAX. 210 MB to fetch, so not a part of .venv from the start.
test-tpu: $(STAMP) ## Install libtpu and compile for TPUs ahead of time; no TPU needed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt 'jax[tpu]'
	OMP_NUM_THREADS=1 $(PY) -m pytest --quiet -m libtpu $(ARGS)

lint: $(STAMP) ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Let ruff fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Without its dependencies: it runs with this environment's torch, from a folder that only its worker looks into.
OLD := $(VENV)/peers/canvas-engineering-0.5.0
bench-peers: $(STAMP) ## Fetch canvas-engineering 0.5.0, which `make bench` compares with
	test -d $(OLD)/canvas_engineering || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) \
		canvas-engineering==0.5.0 einops

# Status 1 of a run: some result was wrong. The page is written all the same, and tells which.
define measure
	status=0; $(VENV)/bin/canvas-engineering bench run $(1) $(ARGS) || status=$$?; test $$status -le 1
	$(VENV)/bin/canvas-engineering bench report
	$(VENV)/bin/canvas-engineering bench compare
endef

bench: $(STAMP) ## Measure (minutes), render docs/benchmarks.md, show what became slower
	$(call measure)

bench-full: $(STAMP) ## The same with every case and peer (an hour or more)
	$(call measure,--full)
