# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which is made on first use and again when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.runtime
DEV := .venv/.dev
PYTEST := $(BIN)/pytest --dist load --maxschedchunk 2 -q
WORKERS ?= 5
# Tests wait as much as they compute: more processes than cores is right. Slow tests tell whole stories in real time, with many
# processes of their own, and come after the others.

.PHONY: help setup demo test check format lint types clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) ## make .venv with everything that development needs

demo: $(RUN) ## the whole story on this machine, in under a minute
	@$(BIN)/tideover demo

test: $(DEV) ## run the tests, but for the slow ones
	$(PYTEST) -n $(WORKERS) -m "not slow"

check: lint types $(DEV) ## everything that CI checks
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(PYTEST) -n $(WORKERS) -m "not slow"
	$(PYTEST) -n 3 -m slow

format: $(DEV) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(DEV) ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV) ## check the types
	$(BIN)/mypy

clean: ## remove .venv, caches and builds; the data of a private server (.tideover) stays
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tideover needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(RUN): pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[embedded]'
	@touch $@

$(DEV): pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@ $(RUN)
