# Needs Python 3.11 or later and make; everything else goes into $(VENV). `make help` lists the targets.
#
#   PYTHON=python3.12   the interpreter that makes the environment
#   VENV=/path/to/env   another environment; one that has a torch (CUDA, say) keeps it
#   TORCH="torch==X"    what to give pip for torch instead of the pin below; TORCH=skip: leave torch alone
#   ARGS="..."          options for baton serve, pytest, or the benchmarks
#
# On Linux x86-64 some registries deliver a CUDA build for the plain pin, which is larger and works too. For the small one,
# point pip at an index of CPU builds in its configuration, or give TORCH="torch==2.13.0 --index-url URL".

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH ?=
ARGS ?=
TORCH_PIN := torch==2.13.0
HELM_PIN := helm-sdkpy==0.1.32

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PACKAGES := baton.services baton.kernels baton.kvtransfer baton.load
# pip compiles to bytecode on one core; afterwards, on all of them, it takes half the time. Some packages ship files that
# are no Python; they are nobody's imports.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
CHECKS := check-format check-lint check-types check-architecture check-proto check-chart
TEST_WORKERS ?= 2
SEEDS ?= 1000
FIRST ?= 0
FRAMES ?= 100000
GRAMMARS ?= 10000
SEED ?= 1
EXAMPLES ?= 300

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

# ---- use -------------------------------------------------------------------------------------------------------------

.PHONY: serve demo
serve: $(VENV)/.serve ## start NATS, workers and gateway with the bundled model; ARGS="--port 9000 ..."
	@exec $(BIN)/baton serve $(ARGS)

demo: $(VENV)/.serve ## one question through both pools, its answer and receipt
	@exec $(BIN)/baton demo

# ---- develop ---------------------------------------------------------------------------------------------------------

.PHONY: setup test sim explore check conformance fuzz fuzz-api bench chaos gpu-check proto clean $(CHECKS)
setup: $(VENV)/.dev ## make the environment with everything that developing needs

# One compute thread per process: with two test processes and their children on two cores, more only wait for each other.
test: $(VENV)/.dev ## run the whole test suite; ARGS="-k name"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

# One seed alone, with everything that happens in it: make sim ARGS="--seed 17 --trace"
sim: $(VENV)/.dev ## simulate whole installations with faults; SEEDS=10000 FIRST=0
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -P -m helpers.simulation --seeds $(SEEDS) --first $(FIRST) $(ARGS)

explore: $(VENV)/.dev ## go through every state of the handoff protocol with up to two faults; minutes
	$(BIN)/python -P -m baton.kvtransfer.explorer $(ARGS)

check: $(VENV)/.dev .dev/baton ## format, lint, types, layers, protocols, chart
	@$(MAKE) --no-print-directory -k -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)
	@echo "all checks passed"

check-format:
	$(BIN)/ruff format --check --quiet .

check-lint:
	$(BIN)/ruff check --quiet .

check-types: .dev/baton
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))

check-architecture:
	$(BIN)/python -m pytest tests/architecture -q -p no:randomly -p no:cacheprovider

check-proto:
	cd proto && $(BIN)/buf lint

check-chart:
	$(BIN)/python charts/lint.py

# Against a server of ours unless BASE_URL names another: make conformance BASE_URL=http://127.0.0.1:8000 ARGS="--model NAME --api-key K"
conformance: $(VENV)/.dev ## what an OpenAI-compatible server has to do; BASE_URL=... for any other server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/conformance -n0 -q $(if $(BASE_URL),--base-url $(BASE_URL)) $(ARGS)

fuzz: $(VENV)/.dev ## hostile frames against a transfer agent, hostile grammars against a gateway; FRAMES=100000 GRAMMARS=10000 SEED=1
	BATON_FUZZ_FRAMES=$(FRAMES) BATON_FUZZ_GRAMMARS=$(GRAMMARS) BATON_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/fuzz -n0 -s -q --timeout 7200 $(ARGS)

fuzz-api: $(VENV)/.dev ## requests drawn from the OpenAPI page, with no error of the server; EXAMPLES=300 for each route
	BATON_API_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/unit/gateway/test_openapi_cases.py -n0 -q $(ARGS)

bench: $(VENV)/.dev ## benchmarks: a table, and JSON in bench-results/
	$(BIN)/python -P -m baton.load.bench $(ARGS)

# The tests' folder is where its helpers are found; children do not inherit it.
chaos: $(VENV)/.dev ## break a running installation in every way and count; ARGS="--only F4", "--list"
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -P -m chaos $(ARGS)

gpu-check: $(VENV)/.dev ## kernels on a CUDA GPU: compared with their references, then timed; ARGS="--tune"
	$(BIN)/python -P -m baton.kernels.gpu_check $(ARGS)

proto: $(VENV)/.dev ## generate proto/gen/ from proto/baton/
	PYTHON=$(BIN)/python proto/generate.sh

clean: ## remove .venv and everything generated that git ignores
	rm -rf .venv .dev build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache bench-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment -------------------------------------------------------------------------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; name one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Serving needs less than developing. A torch that is there already stays, unless TORCH asks for another.
$(VENV)/.serve: pyproject.toml | $(BIN)/python torch
	$(PIP) --editable '.[local]'
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) --editable '.[local,dev]'
	@# Its wheels work from Python 3.11 on; its metadata says later.
	$(PIP) --ignore-requires-python $(HELM_PIN)
	@$(COMPILE)
	@touch $@

.PHONY: torch
torch: | $(BIN)/python
ifeq ($(TORCH),)
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || $(PIP) $(TORCH_PIN)
else ifneq ($(TORCH),skip)
	$(PIP) $(TORCH)
endif

# mypy cannot follow an editable install's import hook, so it gets the packages as a tree of links.
.dev/baton:
	mkdir -p $@
	for name in services kernels kvtransfer load; do ln -sfn ../../$$name $@/$$name; done
	ln -sfn ../../proto/gen/baton/api $@/api
