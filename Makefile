# The targets that people and CI call; `make` lists them. Everything they need goes into .venv, built once and rebuilt when
# constraints/ or pyproject.toml change. Needs Python 3.11 (PYTHON=...) and a C++ compiler (vLLM compiles kernels when it starts).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= $(shell command -v python3.11 || echo python3)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := service/sedac/engine/backends/_kernels.so
DOCKER ?= docker
TARGETS ?= cpu control
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
ARGS ?=
MATRIX ?= demo demo-sampled demo-long smollm2 mid

.PHONY: help
help: ## list the targets
	@echo "SEDAC: make TARGET [ARGS='...']"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | while IFS=$$'\t' read -r name text; do printf '  %-18s %s\n' "$$name" "$$text"; done

.PHONY: setup
setup: $(KERNELS) ## build .venv from constraints/ (PYTHON=python3.11, TORCH_INDEX=URL to take torch from another index)

$(STAMP): $(wildcard constraints/*) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 12) else f"setup: the pinned set is made for Python 3.11, $(PYTHON) is {v.major}.{v.minor}; make setup PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "setup: virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python constraints/install.py --check-system --torch-index "$(TORCH_INDEX)"
	@echo "setup: SEDAC itself, editable"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "setup: done; $(BIN)/sedac --help"

$(KERNELS): $(STAMP) $(wildcard service/sedac/engine/backends/kernels/*)
	@$(BIN)/python -m sedac.engine.backends.build
	@touch $@

.PHONY: serve
serve: $(KERNELS) ## serve the demo model on port 8000, control service beside it (ARGS='MODEL --max-model-len 2048 ...')
	$(BIN)/sedac serve $(ARGS)

.PHONY: test
test: $(KERNELS) ## run the tests, the thorough part left out (ARGS='tests/control -k etag')
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-full
test-full: $(KERNELS) ## run every test
	$(BIN)/python -m pytest -m "" $(ARGS)

.PHONY: check
check: $(STAMP) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: proto
proto: $(STAMP) ## regenerate service/sedac/contract/v1 from proto/
	$(BIN)/python proto/generate.py

.PHONY: docs
docs: $(STAMP) ## write docs/reference, docs/overview.svg and the variables in docker-compose.yml anew, then build the site into build/docs
	$(BIN)/python deploy/compose_variables.py
	$(BIN)/python docs/generate
	$(BIN)/python docs/overview.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

.PHONY: demo-model
demo-model: $(KERNELS) ## train the demo model again, into build/demo-model (an hour on 2 cores; resumes)
	$(BIN)/python probes/demo/train_model.py --work build/demo-model $(ARGS)

.PHONY: demo-probes
demo-probes: $(KERNELS) ## the whole workshop on the demo model, into build/demo-probes: from recording to a certified policy and a report
	$(BIN)/sedac-probes demo $(ARGS)

.PHONY: demo-draft
demo-draft: $(KERNELS) ## drafts of the demo model, into build/demo-draft: adapters, exit heads, a reduced one, one table (resumes)
	$(BIN)/sedac-probes distill --work build/demo-draft --layers 2,3,4 --record 8 $(ARGS)
	$(BIN)/sedac-probes distill --work build/demo-draft --kind exit-head --layers 8 $(ARGS)
	$(BIN)/sedac-probes distill --work build/demo-draft --kind reduced --probe-set probes/sedac_demo/probe-set --out build/demo-draft/best $(ARGS)

.PHONY: bench
bench: $(KERNELS) ## speed against plain vLLM: attached, reduced, exited (ARGS=--help); writes benchmarks/results/speed.*
	for mode in eager compiled; do $(BIN)/python benchmarks/speed.py --mode $$mode --out benchmarks/results/speed $(ARGS); done

.PHONY: bench-quality
bench-quality: $(KERNELS) ## quality against saved FLOPs of every mechanism on held-out text; writes benchmarks/results/quality.*
	$(BIN)/sedac-probes compare --out benchmarks/results/quality $(ARGS)

.PHONY: bench-speculation
bench-speculation: $(KERNELS) ## every way of speculation against plain vLLM, demo and mid-size (ARGS=--help); writes benchmarks/results/speculation.*
	for model in demo mid; do $(BIN)/python benchmarks/speculation.py --model $$model --out benchmarks/results/speculation $(ARGS); done

.PHONY: bench-serving
bench-serving: $(KERNELS) ## what a client sees over HTTP, every matrix of benchmarks/serving (MATRIX='demo mid', ARGS='--rounds 3'; resumes); hours
	for name in $(MATRIX); do $(BIN)/sedac bench benchmarks/serving/$$name.yaml --out benchmarks/results/serving/$$name $(ARGS); done

.PHONY: bench-cuda
bench-cuda: ## on a GPU, .venv or not: the card, its graphs and kernels, then engines (ARGS='--seconds 300'); writes benchmarks/results/cuda/
	python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo python3); status=0; \
	$$python benchmarks/cuda/card.py --out benchmarks/results/cuda --seconds 300 $(ARGS) || status=$$?; \
	$$python benchmarks/cuda/engine.py --out benchmarks/results/cuda --seconds 300 $(ARGS) || status=$$?; exit $$status

.PHONY: bench-control
bench-control: $(KERNELS) ## the control plane under load, under faults, with a fleet; writes benchmarks/results/control.*
	for part in fleet load away; do $(BIN)/python -m benchmarks.control $$part $(ARGS); done

.PHONY: image
image: ## build the images sedac:cpu and sedac:control (TARGETS=cuda; ARGS='--secret ...': see Dockerfile)
	for target in $(TARGETS); do DOCKER_BUILDKIT=1 $(DOCKER) build --target $$target --tag sedac:$$target \
		--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) .; done

.PHONY: up
up: ## engine, control service, Prometheus and Grafana in containers; answers on 127.0.0.1:8000
	DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1 $(COMPOSE) up --detach $(ARGS)

.PHONY: down
down: ## stop the containers (ARGS=--volumes forgets policies and metrics too)
	$(COMPOSE) down $(ARGS)

.PHONY: clean
clean: ## remove .venv and caches; build/demo-model stays (it took an hour)
	rm -rf $(VENV) $(KERNELS) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find service probes tests testing benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
