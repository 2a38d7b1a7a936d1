# Everything runs from a virtual environment in .venv, which the first target that needs it builds.
# Python for it: make PYTHON=python3.12 ...

PYTHON ?= python3
ASSETS ?= .assets
NAMES  ?= smollm2 alpaca
ARGS   ?=
JOBS   ?= 2

PY    := .venv/bin/python
STAMP := .venv/.installed

SOURCES := hf_memtune scripts tests
# Settings, commands, arithmetic, layout: no training of more than a few steps.
FAST := tests/test_*.py tests/core tests/visualization tests/packaging/test_layout.py tests/packaging/test_makefile.py \
	$(addprefix tests/cli/test_,help.py main.py merge.py settings.py data.py generate.py) $(addprefix tests/training/test_,settings.py reversible_settings.py)

# One thread a worker: more make small matrices slower, and bitwise comparisons depend on the count.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help .venv demo lint types test test-fast coverage assets bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[-.a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP) ## create .venv, or bring it up to date with setup.cfg and constraints.txt

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt needs Python 3.11 or newer, got %s: make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: assets ## fine-tune a small real model with and without token seeking, and compare
	$(PY) scripts/demo.py --model $(ASSETS)/models/smollm2-135m-instruct --data $(ASSETS)/data/alpaca/train.jsonl $(ARGS)

lint: $(STAMP) ## check the code with ruff: rules and format
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)

types: $(STAMP) ## check the types of hf_memtune/core and hf_memtune/methods with mypy
	$(PY) -m mypy

test-fast: $(STAMP) ## run the part of the tests that takes a minute
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -q $(FAST) $(ARGS)

coverage: $(STAMP) ## run the test suite, and list the lines that no test runs
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -q --cov=hf_memtune --cov-report=term-missing:skip-covered $(ARGS)

test: $(STAMP) ## run the test suite (ARGS="-k ledger" for a part)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -q $(ARGS)

assets: $(STAMP) ## fetch weights and data into .assets (NAMES="smollm2 alpaca ..."; done ones are skipped)
	$(PY) scripts/assets/get_assets.py --out $(ASSETS) $(NAMES)

bench: assets ## measure memory and time, write the result files and the tables of docs/measurements.md
	$(PY) scripts/bench_memory.py
	$(PY) scripts/bench_speed.py --model $(ASSETS)/models/smollm2-135m-instruct --data $(ASSETS)/data/alpaca/train.jsonl
	$(PY) scripts/tables.py

clean: ## remove build outputs and caches (keeps .venv, .assets and out)
	rm -rf build dist .pytest_cache *.egg-info
	find hf_memtune scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
