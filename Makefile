# Everything here runs inside .venv, which `make setup` creates and keeps up to date; nothing else is touched.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast coverage openrlhf-env test-openrlhf verl-env test-verl locks lint docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Create .venv with everything for demo, tests, lint and docs (quick when it is up to date)

# uv is the installer, and pip brings it. uv does not read pip's settings, so an index or a folder of wheels that pip is
# set to use is handed on. Without such a folder uv picks the build of torch that fits the machine: the CPU build where
# it finds no NVIDIA driver. With one no build is picked, because that would ask an index which may be out of reach.
define HAND_ON_PIP_SETTINGS
set -e; \
pip_setting() { $(BIN)/python -m pip config get "global.$$1" 2>/dev/null || true; }; \
links=$$(echo $${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$(pip_setting find-links)}} | tr ' ' ','); \
index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$(pip_setting index-url)}}; \
if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; \
else export UV_TORCH_BACKEND="$${UV_TORCH_BACKEND:-$${torch:-auto}}"; fi
endef

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jfhpo needs Python 3.11 or newer, and '$(PYTHON)' is not: name another one, e.g. make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing into .venv; the first time this downloads about 1 GB"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv
	@$(HAND_ON_PIP_SETTINGS); \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[all]" --group dev
	@touch $@

demo: $(READY) ## Search hyperparameters for a tiny language model on this machine (minutes)
	@$(BIN)/jfhpo search examples/demo.yaml

# Tests neither phone home nor look anything up on a model hub.
test coverage test-fast: export DO_NOT_TRACK = true
test coverage test-fast: export HF_HUB_OFFLINE = 1
test coverage test-fast: export RAY_USAGE_STATS_ENABLED = 0

test: $(READY) ## Run the whole test suite
	@echo "Collecting the tests; those that wait longest run first, so it takes a minute or two until the first dot appears"
	@$(BIN)/pytest --quiet --numprocesses 3 --dist loadfile --no-loadscope-reorder

coverage: $(READY) ## Run the whole test suite and say which lines it has not run (slower)
	@$(BIN)/pytest --quiet --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

test-fast: $(READY) ## Run the tests that take seconds
	@$(BIN)/pytest --quiet --numprocesses 3 --dist loadfile -m "not slow"

# The trainer's environment cannot be this one: vLLM and Prefect need different versions of fastapi.
OPENRLHF_ENV ?= .openrlhf
ifdef GPU
OPENRLHF_LOCK := deployments/openrlhf-gpu.txt
OPENRLHF_INSTALL = unset UV_TORCH_BACKEND; $(BIN)/uv pip install --require-hashes
else
OPENRLHF_LOCK := jfhpo_core/trainers/openrlhf/cpu_shim/requirements.txt
OPENRLHF_INSTALL = $(BIN)/uv pip install
endif

openrlhf-env: $(OPENRLHF_ENV)/.ready ## Build OpenRLHF's environment for CPU tests (3 GB); GPU=1: for runs on GPUs

$(OPENRLHF_ENV)/.ready: $(OPENRLHF_LOCK) | $(READY)
	@echo "Installing OpenRLHF, vLLM and DeepSpeed into $(OPENRLHF_ENV) from $(OPENRLHF_LOCK)"
	@$(PYTHON) -m venv --clear $(OPENRLHF_ENV)
	@torch=cpu; export DS_BUILD_OPS=0; $(HAND_ON_PIP_SETTINGS); \
	$(OPENRLHF_INSTALL) --quiet --python $(OPENRLHF_ENV)/bin/python --no-deps --requirement $(OPENRLHF_LOCK)
	@touch $@

test-openrlhf: export DO_NOT_TRACK = true
test-openrlhf: export HF_HUB_OFFLINE = 1
test-openrlhf: $(READY) $(OPENRLHF_ENV)/.ready ## Run a real search with OpenRLHF, vLLM and DeepSpeed on CPU (about 10 minutes)
	@JFHPO_OPENRLHF_PYTHON=$(abspath $(OPENRLHF_ENV))/bin/python $(BIN)/pytest --quiet -m openrlhf tests/trainers/openrlhf

VERL_ENV ?= .verl
ifdef GPU
VERL_LOCK := deployments/verl-gpu.txt
VERL_INSTALL = unset UV_TORCH_BACKEND; $(BIN)/uv pip install --require-hashes
else
VERL_LOCK := jfhpo_core/trainers/verl/cpu_shim/requirements.txt
VERL_INSTALL = $(BIN)/uv pip install --no-deps
endif

verl-env: $(VERL_ENV)/.ready ## Build verl's environment for CPU tests (2.5 GB); GPU=1: for runs on GPUs

$(VERL_ENV)/.ready: $(VERL_LOCK) | $(READY)
	@echo "Installing verl and vLLM into $(VERL_ENV) from $(VERL_LOCK)"
	@$(PYTHON) -m venv --clear $(VERL_ENV)
	@torch=cpu; $(HAND_ON_PIP_SETTINGS); \
	$(VERL_INSTALL) --quiet --python $(VERL_ENV)/bin/python --requirement $(VERL_LOCK)
	@touch $@

test-verl: export DO_NOT_TRACK = true
test-verl: export HF_HUB_OFFLINE = 1
test-verl: $(READY) $(VERL_ENV)/.ready ## Run a real search with verl, vLLM and FSDP on CPU (about 10 minutes)
	@JFHPO_VERL_PYTHON=$(abspath $(VERL_ENV))/bin/python $(BIN)/pytest --quiet -m verl tests/trainers/verl

# A lock is resolved again from what it holds: it changes if one of its files has left the registry, or its hash.
RESOLVE = $(BIN)/uv pip compile --quiet --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
  --generate-hashes --no-annotate --no-header

locks: $(READY) ## Check that the registry still has what the locks for GPUs name (downloads metadata only)
	@$(HAND_ON_PIP_SETTINGS); unset UV_TORCH_BACKEND; cd deployments; \
	for name in openrlhf verl; do \
	  fresh=$$(mktemp); cp $$name-gpu.txt $$fresh; \
	  override=; [ ! -f $$name-gpu.override ] || override="--override $$name-gpu.override"; \
	  ../$(RESOLVE) $$name-gpu.in $$override --output-file $$fresh; \
	  grep -v '^#' $$name-gpu.txt | diff - $$fresh || { \
	    echo "deployments/$$name-gpu.txt is no longer what $$name-gpu.in resolves to (see above): try the new one on GPUs," \
	      "then replace it" >&2; exit 1; }; \
	  rm $$fresh; echo "deployments/$$name-gpu.txt is up to date"; \
	done

lint: $(READY) ## Check style, format, types and the layering of the packages
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

docs: $(READY) ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove .venv and what tools leave behind; studies (mlflow.db, mlruns, .jfhpo) stay
	rm -rf .venv .openrlhf .verl site dist build htmlcov .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
