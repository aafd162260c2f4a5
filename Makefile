# Everything runs in .venv, which tools/setup_venv.sh makes and updates. Only programs that need SGLang run in
# .venv-sglang, made by tools/setup_sglang.sh: the two engines want different versions of the same packages.
PYTHON := .venv/bin/python
SGLANG_PYTHON := .venv-sglang/bin/python
SGLANG_TESTS := tests/sglang tests/sglang_engine tests/test_compat.py
SOURCES := kvcached_core cli plugins devkit tests tools examples benchmarks
REPORTS := build/test-report.d

.PHONY: help setup setup-sglang programs dev demo test test-sglang test-vllm ledger-long check format compat wheels clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## make .venv with torch, vLLM for the CPU, the project and its tools
	@tools/setup_venv.sh

setup-sglang: ## make .venv-sglang with torch, SGLang on the CPU and the project
	@tools/setup_sglang.sh

programs: ## fetch programs that tests run and pip does not have: tmux, Prometheus
	@tools/setup_programs.sh

dev: setup setup-sglang programs ## set up both engines, run the checks before each commit, and rewrite docs/kvctl.md
	@.venv/bin/pre-commit install
	$(PYTHON) -m tools.kvctl_reference

demo: setup $(if $(findstring sglang,$(ENGINES)),setup-sglang) ## serve two models on one memory budget; ENGINES=vllm,sglang: one of each
	@ENGINES='$(ENGINES)' $(PYTHON) -m examples.demo

test: ## run the whole suite, then compare the tests' counts with their minima
	@$(MAKE) --no-print-directory -j2 setup setup-sglang programs
	@$(MAKE) --no-print-directory check
	@rm -rf $(REPORTS) build/junit*.xml && mkdir -p $(REPORTS)
	@failed=; \
	$(PYTHON) -m tools.test_runs || failed=yes; \
	$(PYTHON) -m tools.test_report || failed=yes; \
	test -z "$$failed"

test-sglang: setup-sglang ## run only the tests that need SGLang
	$(SGLANG_PYTHON) -m pytest -q $(SGLANG_TESTS)

test-vllm: setup ## run vLLM's engine tests with another version: make test-vllm VLLM=0.30.0 (0.31.0, 0.33.0)
	$(PYTHON) -m tools.other_vllm $(VLLM)

ledger-long: setup ## test the ledger against its model with 20,000 histories of 100 steps (an hour)
	KVCACHED_LEDGER_EXAMPLES=20000 KVCACHED_LEDGER_STEPS=100 $(PYTHON) -m pytest -q tests/ledger/test_state_machine.py

check: setup ## check lint, format, types and import layers
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --cache-dir build/import-linter

format: setup ## apply the formatter and the safe fixes
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

compat: setup ## check, without installing them, that supported vLLM and SGLang wheels have all that the plugins rely on
	@$(PYTHON) -m tools.compat

wheels: setup ## build the four wheels into build/dist
	@$(PYTHON) -m tools.wheels build/dist

clean: ## remove the environments and everything built
	rm -rf .venv .venv-sglang build .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info cli/*.egg-info plugins/*/*.egg-info devkit/sglang_rig/*.egg-info
