# Everything runs in .venv, which tools/setup_venv.sh makes and keeps up to date.
PYTHON := .venv/bin/python
SOURCES := kvcached_core cli plugins tests tools examples benchmarks
REPORTS := build/test-report.d

.PHONY: help setup dev demo test ledger-long check format compat wheels clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: ## make .venv with torch, vLLM for the CPU, the project and its tools
	@tools/setup_venv.sh

dev: setup ## likewise, and from now on the checks before each commit; the reference of kvctl is written anew
	@.venv/bin/pre-commit install
	$(PYTHON) -m tools.kvctl_reference

demo: setup ## serve two models on one budget and watch KV memory move between them
	@$(PYTHON) -m examples.demo

test: check ## run the whole suite; ends with the counts held against their minima
	@rm -rf $(REPORTS) build/junit.xml && mkdir -p $(REPORTS)
	$(PYTHON) -m pytest -q --junit-xml=build/junit.xml
	@$(PYTHON) -m tools.test_report

ledger-long: setup ## the ledger against its model, 20,000 histories of 100 steps: an hour
	KVCACHED_LEDGER_EXAMPLES=20000 KVCACHED_LEDGER_STEPS=100 $(PYTHON) -m pytest -q tests/ledger/test_state_machine.py

check: setup ## lint, format, types, layers of imports
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --cache-dir build/import-linter

format: setup ## apply the formatter and the safe fixes
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

compat: setup ## check every seam against the vLLM wheels we support, statically
	@$(PYTHON) -m tools.compat

wheels: setup ## build the three wheels into build/dist
	@$(PYTHON) -m tools.wheels build/dist

clean: ## remove .venv and everything built
	rm -rf .venv build .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info cli/*.egg-info plugins/*/*.egg-info
