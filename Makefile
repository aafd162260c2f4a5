# Everything runs in .venv, which tools/setup_venv.sh makes and keeps up to date; what needs SGLang runs in
# .venv-sglang, from tools/setup_sglang.sh: the two engines want different versions of the same packages.
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

programs: ## fetch what tests drive and pip has not: tmux, Prometheus
	@tools/setup_programs.sh

dev: setup setup-sglang programs ## both engines, and from now on the checks before each commit; the reference of kvctl is written anew
	@.venv/bin/pre-commit install
	$(PYTHON) -m tools.kvctl_reference

demo: setup $(if $(findstring sglang,$(ENGINES)),setup-sglang) ## serve two models on one budget; ENGINES=vllm,sglang: one of each
	@ENGINES='$(ENGINES)' $(PYTHON) -m examples.demo

test: ## run the whole suite; ends with the counts held against their minima
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

compat: setup ## check every seam against the wheels of vLLM and SGLang that we support, statically
	@$(PYTHON) -m tools.compat

wheels: setup ## build the four wheels into build/dist
	@$(PYTHON) -m tools.wheels build/dist

clean: ## remove the environments and everything built
	rm -rf .venv .venv-sglang build .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info cli/*.egg-info plugins/*/*.egg-info devkit/sglang_rig/*.egg-info
