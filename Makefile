# Everything a contributor or CI runs. Needs python3 (3.10 or newer, with venv) and make; the rest is set up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# Extra arguments for pytest, the demo or the benchmarks: make test ARGS="-k layers"
ARGS ?=
# How long a dataset lives in the nightly run, and the number that decides its fate (a new one each time).
STEPS ?= 20000
SEED ?=

# Material for MkDocs prints a banner about a future major release on every run.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip runs at once would spoil the one .venv.
.NOTPARALLEL:
.PHONY: help demo docs test check nightly bench format clean

help:  ## Print this help
	@awk 'BEGIN { FS = ":.*## "; print "Usage: make <target> [PYTHON=python3.12] [ARGS=...]" } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

##@ Try it

demo: $(VENV)/.stamp-run  ## Index 12,000 real vectors into .demo/ and search them
	$(BIN)/python examples/demo.py $(ARGS)

docs: $(VENV)/.stamp-docs  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

##@ Change it

test: $(VENV)/.stamp-dev  ## Run all tests except the nightly ones
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.stamp-dev $(VENV)/.stamp-docs  ## Lint, format, types, layers, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/house/test_layers.py tests/house/test_docs.py
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.stamp-dev  ## Rewrite the sources as `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

##@ Measure it

nightly: $(VENV)/.stamp-dev  ## Run the long tests, and property tests with many more cases
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -m nightly --timeout 1800 $(ARGS)
	$(BIN)/python -W ignore -m tests.living.drive --steps $(STEPS) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.stamp-bench  ## Run the benchmarks; results go to .bench/
	$(BIN)/python -m benchmarks $(ARGS)

##@ Tidy up

clean:  ## Remove all that make made, the virtual environment included
	rm -rf $(VENV) .demo .bench site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of packages; a change of pyproject.toml installs anew.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=<a newer one>")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-docs: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-bench: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[bench,serve,ray,s3]'
	@touch $@ $(VENV)/.stamp-run
