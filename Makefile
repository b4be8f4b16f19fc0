# Every target does its own set-up: python3 (3.11 or newer), make and git are sufficient.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export PYTHONUNBUFFERED := 1

IN := .venv/bin/
PYTHON := $(IN)python

# Never parallel, whatever -j says: steps print headings, share caches and two cores, and a stack test measures time.
.NOTPARALLEL:

# Tests with the mark "slow" run in `make slow`, or with SLOW=1.
QUICK = $(if $(SLOW),,-m "not slow")
# Unit tests file by file, the longest first: what the tests of a file share is made once, not in each process.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4
# Three local clouds.
CLOUDS := --numprocesses 3 --dist loadfile --no-loadscope-reorder

heading = @echo; echo "== $(1)"

.PHONY: help setup demo picture local env send test lint types validate audit docs unit attacks simulation sim scale stack slow faults reliability conformance bench batch lock openapi prices console console-test package publish clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create the environments (.venv and .local/emulator); quick if nothing changed
	@python3 local/set_up.py

demo: setup ## Run predictions on a local cloud and show each step (VERBOSE=1: with figures; LIVE=1: the real Replicate, costs money)
	@$(PYTHON) -m local demo $(if $(LIVE),--live) $(if $(VERBOSE),--verbose)

picture: setup ## Run the demonstration and draw docs/demo.svg, which the README shows
	@$(PYTHON) -m local demo --picture docs/demo.svg $(if $(VERBOSE),--verbose)

local: setup ## Keep a local cloud running; its addresses are in .local/stack.json (LOCAL_DIR=… for a second one)
	@exec $(PYTHON) -m local run

env: ## Print the variables that the pages use, for the stack of "make local", as exports that a shell evaluates
	@python3 local/set_up.py >&2
	@$(PYTHON) -m local env

send: setup ## Send EVENT=events/… to the stack of "make local", and follow its prediction (MODEL=…, FILE=…)
	@$(PYTHON) -m local send "$(EVENT)" $(if $(MODEL),--model "$(MODEL)") $(if $(FILE),--file "$(FILE)")

test: lint types validate unit attacks simulation stack ## Run all checks and tests except those of "make slow"; the first failure stops it

lint: setup ## Check style, layers, words, and that generated files are up to date (requirements, openapi.json, prices.json)
	$(call heading,lint)
	@$(IN)ruff check .
	@$(IN)ruff format --check .
	@$(IN)lint-imports --no-logo --no-cache
	@$(PYTHON) -m local.lock --check
	@$(PYTHON) -m local.openapi --check
	@$(PYTHON) -m local.prices --check
	@$(PYTHON) -m local.words

types: setup ## Check the types
	$(call heading,types)
	@$(IN)mypy

validate: setup ## Check template.yaml with SAM and cfn-lint
	$(call heading,validate)
	@$(PYTHON) -m local validate

audit: setup ## Check template, policies and state machines with tools of others, and packages for vulnerabilities (AUDIT=strict: fail if unknown)
	$(call heading,audit)
	@$(PYTHON) -m local.audit

docs: setup ## Build the site of docs/ into .local/site; a broken link fails
	$(call heading,docs)
	@$(PYTHON) -m local.docs

unit: setup ## Run the unit tests
	$(call heading,unit tests)
	@$(PYTHON) -m pytest tests/unit $(QUICK) $(SIDE_BY_SIDE) --dist loadfile

attacks: setup ## Run the attack tests: hostile webhooks, addresses, files, JSON, schemas, owners
	$(call heading,attacks)
	@$(PYTHON) -m pytest tests/attacks $(QUICK) $(SIDE_BY_SIDE)

simulation: setup ## Run 5,000 schedules of faults (SLOW=1: also with sabotaged code, which must fail)
	$(call heading,simulation)
	@$(PYTHON) -m pytest tests/simulation $(QUICK) $(SIDE_BY_SIDE)

sim: setup ## Run SCHEDULES=100000 schedules of faults and write docs/simulation.md; SEED=n shows one step by step
	@$(PYTHON) -m tests.simulation $(if $(SEED),--seed $(SEED),--schedules $(or $(SCHEDULES),100000) --write)

scale: setup ## Run 280 predictions a second for SECONDS_OF_LOAD=600 and other large loads in virtual time (an hour), and write docs/scale.md
	@$(PYTHON) -m tests.simulation.scale_report $(if $(SECONDS_OF_LOAD),--seconds $(SECONDS_OF_LOAD)) $(if $(LINES),--lines $(LINES))

stack: setup ## Run the stack tests, on three local clouds side by side
	$(call heading,stack tests)
	@$(PYTHON) -m pytest tests/stack $(QUICK) $(CLOUDS)

slow: setup ## Run the slow tests, which "make test" leaves out (SLOW=1 with one kind: all of that kind)
	$(call heading,slow tests)
	@$(PYTHON) -m pytest tests/unit tests/attacks tests/simulation -m slow $(SIDE_BY_SIDE)
	@$(PYTHON) -m pytest tests/stack -m slow $(CLOUDS)

faults: setup ## Run PREDICTIONS=200 on a local cloud with all kinds of faults (SEED=n; CONCURRENCY=10: as in a new account; or CALL="…" FAULT="killed after")
	@$(PYTHON) -m tests.stack.faults $(if $(PREDICTIONS),--predictions $(PREDICTIONS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(CONCURRENCY),--concurrency $(CONCURRENCY)) $(if $(CALL),--call "$(CALL)") $(if $(FAULT),--fault "$(FAULT)")

reliability: setup ## Run all tests and write docs/reliability.md: each promise, its tests, their figures and times
	@$(PYTHON) -m tests.reliability

conformance: setup ## Run the clients' flows (needs node) and write docs/conformance.md
	@$(PYTHON) -m tests.conformance

bench: setup ## Measure imports, the steps and cost of a prediction and of a batch, copying, webhooks (WRITE=1: write docs/cost.md)
	@$(PYTHON) -m tests.benchmarks $(if $(WRITE),--write)

batch: setup ## Run a batch of LINES=1000 lines on the local cloud, with its progress, and measure it
	@$(PYTHON) -m tests.benchmarks.batch $(if $(LINES),--lines $(LINES))

lock: setup ## Update requirements/ and the layer's from pyproject.toml (UPGRADE=1: newest versions)
	@$(PYTHON) -m local.lock $(if $(UPGRADE),--upgrade)

openapi: setup ## Write openapi.json, which the layer ships, from openapi.yaml
	@$(PYTHON) -m local.openapi

prices: setup ## Write prices.json, which the layer ships, from prices/
	@$(PYTHON) -m local.prices

console: setup ## Build the console into functions/serve_console/assets (needs node; CHECK=1: only compare)
	@$(PYTHON) -m local.console $(if $(CHECK),--check)

console-test: setup ## Test the console in a real browser (needs node; installs Chromium by apt if not found)
	$(call heading,console)
	@$(PYTHON) -m local.console --check
	@$(PYTHON) -m local.console_test

package: setup ## Build dist/: the stack as a zip that deploys without a build, with SBOM and SHA256SUMS (TAG=v0.1.0: only for that version)
	$(call heading,package)
	@$(PYTHON) -m local.package $(if $(TAG),--tag "$(TAG)")

publish: setup ## Make the GitHub release TAG=v0.1.0 with the files of dist/ (needs gh); a second time it replaces them
	@$(PYTHON) -m local.package --tag "$$TAG"
	@if gh release view "$$TAG" >/dev/null 2>&1; then \
		gh release upload "$$TAG" dist/* --clobber && gh release edit "$$TAG" --draft=false; \
	else \
		gh release create "$$TAG" dist/* --verify-tag --title "$$TAG" --notes-file .local/release-notes.md; \
	fi

clean: ## Remove everything that these commands created
	rm -rf .venv .local .aws-sam dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
