# `make help` lists the targets. All but help and clean set up .venv first; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A process a core; the tests of a file, which may share what they have made, stay in one.
IN_PARALLEL := -n auto --dist loadfile

.PHONY: help demo test test-fast lint types bench wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

demo: $(VENV)/demo  ## fine-tune a real model with LoRA on the bundled reviews
	$(BIN)/lightning-ft train experiment=demo

test: $(VENV)/dev  ## run all tests
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-fast: $(VENV)/dev  ## run the tests that take no more than seconds
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

lint: $(VENV)/dev  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev  ## check types
	$(BIN)/mypy

bench: $(VENV)/dev  ## measure speed and memory beside stock PEFT's, and write benchmarks/results/ and its README
	$(BIN)/python -m benchmarks

wheel: $(VENV)/dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove what the targets made (.venv, caches, builds); runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras: made again when the project's requirements change.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (some minutes, once) …"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (some minutes, once) …"
	$(PIP) -e '.[demo,dev,bench]'
	@touch $@
