# Everything here does its own set-up: python3 (3.11 or newer), make and git are enough.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export PYTHONUNBUFFERED := 1

IN := .venv/bin/
PYTHON := $(IN)python

.PHONY: help setup demo local test lint types validate unit stack bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make the environments (.venv and .local/emulator); quick when nothing changed
	@python3 local/set_up.py

demo: setup ## Run predictions through a local cloud and tell what happens (LIVE=1: the real Replicate, costs money)
	@$(PYTHON) -m local demo $(if $(LIVE),--live)

local: setup ## Keep a local cloud running: .local/stack.json says where (LOCAL_DIR=… for a second one)
	@exec $(PYTHON) -m local run

test: setup lint types validate ## Check everything: style, types, template, unit tests, stack tests
	@$(PYTHON) -m pytest tests/unit tests/stack

lint: setup ## Check the style, and that the layer's requirements are those of the lock
	@$(IN)ruff check .
	@$(IN)ruff format --check .
	@diff <($(EXPORT)) layers/predictions/requirements.txt || { echo "run: make lock"; exit 1; }

types: setup ## Check the types
	@$(IN)mypy

validate: setup ## Check template.yaml with SAM and cfn-lint
	@$(PYTHON) -m local validate

unit: setup ## Run the unit tests
	@$(PYTHON) -m pytest tests/unit

stack: setup ## Run the stack tests, on a local cloud of their own
	@$(PYTHON) -m pytest tests/stack

bench: setup ## Measure import times and the figures of a prediction
	@$(PYTHON) -m tests.benchmarks

# What the layer holds: the locked dependencies of the project itself. botocore, which the X-Ray SDK asks for, comes with
# the Lambda runtime and would be three quarters of the layer.
define EXPORT
{ echo "# Made from uv.lock by make lock: change the dependencies in pyproject.toml."; \
  $(IN)uv export --quiet --frozen --no-default-groups --no-emit-project --no-annotate --no-header --prune botocore; }
endef

lock: setup ## Bring uv.lock and the layer's requirements up to date with pyproject.toml
	@$(IN)uv lock
	@$(EXPORT) > layers/predictions/requirements.txt

clean: ## Remove everything that was made here
	rm -rf .venv .local .aws-sam .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
