# Everything runs from a virtual environment in .venv, which the first target that needs it builds.
# Python for it: make PYTHON=python3.12 ...

PYTHON ?= python3
ASSETS ?= .assets
NAMES  ?= smollm2 alpaca
ARGS   ?=
JOBS   ?= 2

PY    := .venv/bin/python
STAMP := .venv/.installed

# One thread a worker: more make small matrices slower, and bitwise comparisons depend on the count.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help .venv demo test assets bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[.a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP) ## create .venv, or bring it up to date with setup.cfg and constraints.txt

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt needs Python 3.11 or newer, got %s: make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	@touch $@

demo: assets ## fine-tune a small real model with and without token seeking, and compare
	$(PY) scripts/demo.py $(ARGS)

test: $(STAMP) ## run the test suite (ARGS="-k ledger" for a part)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -q $(ARGS)

assets: $(STAMP) ## fetch weights and data into .assets (NAMES="smollm2 alpaca ..."; done ones are skipped)
	$(PY) scripts/assets/get_assets.py $(ASSETS) $(NAMES)

bench: assets ## measure memory and time, write the result files and the tables of docs/measurements.md
	$(PY) scripts/bench_memory.py
	$(PY) scripts/bench_speed.py
	$(PY) scripts/tables.py

clean: ## remove build outputs and caches (keeps .venv, .assets and out)
	rm -rf build dist .pytest_cache *.egg-info
	find hf_memtune scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
