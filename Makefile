# groundserve. `make` or `make help` says what there is; what CI runs is what a person runs.
.DEFAULT_GOAL := help
.PHONY: help install up down test docker-test check chaos bench bench-features bench-routing bench-autoscale simulate lock fuzz docs

# The first of these that runs (a version manager's stub may stand in for a Python that is not there).
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
BIN := .venv/bin

# make up: which model (smollm2 answers questions, tiny-llava names colours in images), and how many replicas.
MODEL ?= smollm2
REPLICAS ?= 2
SERVICE = $(patsubst smollm2-135m,smollm2,$(MODEL))
# Made once, here and not by the replicas, so that a person sees it being made.
EMBEDDED = $(filter smollm2-135m tiny-llava,$(patsubst smollm2,smollm2-135m,$(MODEL)))

help: ## this list
	@echo "Settings: MODEL=$(MODEL) REPLICAS=$(REPLICAS) PYTHON=$(PYTHON) TESTS=$(TESTS)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv from the lock files, if it is missing or stale
	@test -n "$(PYTHON)" || { echo "make install: no Python found: install Python 3.11, or say PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) .ci/install.py

up: install ## serve MODEL with REPLICAS replicas on http://localhost:30001, on this machine, without Docker
	@test -f services/$(SERVICE).yaml || { echo "make up: no service for MODEL=$(MODEL); there are: $$(cd services && echo *.yaml | sed 's/\.yaml//g')" >&2; exit 1; }
	@$(if $(EMBEDDED),$(BIN)/python -m replica.models $(EMBEDDED))
	@$(BIN)/groundserve up services/$(SERVICE).yaml --env REPLICAS=$(REPLICAS)

down: ## stop what make up started, and every other service that groundserve runs here
	@if [ -x $(BIN)/groundserve ]; then $(BIN)/groundserve down --all; else echo "nothing is installed, so nothing runs"; fi

test: install ## all tests that need neither GPU nor Docker, the real SGLang included (TESTS=tests/replica for a part)
	@$(BIN)/python -m pytest $(TESTS)

docker-test: install ## all tests of the images and compose.yaml; needs Docker, builds images, takes minutes
	@docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 || { echo "make docker-test: no Docker engine with Compose v2 answers: start it, or get it from docs.docker.com/engine/install" >&2; exit 1; }
	@$(BIN)/python -m pytest -m docker --durations=5 tests/e2e/docker

check: install ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fuzz: install ## hostile bytes for a minute (ARGS="--seconds 600 --seed 7")
	@$(BIN)/python -m tests.wire.fuzz --seconds 60 $(ARGS)

chaos: install ## 1,000 seeded faults under load, every promise looked at after each (ARGS="--steps 100 --seed 7")
	@$(BIN)/python -m tests.chaos --steps 1000 $(ARGS)

bench: install ## what relaying costs, beside nginx, Envoy and the Rust routers (ARGS="--rounds 1" for a short one)
	@$(BIN)/python -m tests.bench.relay $(ARGS)

bench-features: install ## what metrics, keys and routing by prefix cost, beside the same balancer without (ARGS=...)
	@$(BIN)/python -m tests.bench.features $(ARGS)

bench-routing: install ## what routing by prefix brings, on two real replicas (ARGS=...)
	@$(BIN)/python -m tests.bench.routing $(ARGS)

bench-autoscale: install ## our autoscaler beside SkyServe's own, in virtual time (ARGS="--only ramp jitter")
	@$(BIN)/python -m tests.bench.autoscale $(ARGS)

simulate: install ## the routing policies in virtual time, beside others and an oracle (ARGS=--full)
	@$(BIN)/python -m tests.lab.simulate $(ARGS)

docs: install ## write anew what docs/ takes from the code: the page of commands, the pictures
	@$(BIN)/python -m tests.docs

lock: ## write the lock files anew (needs uv)
	@.ci/lock
