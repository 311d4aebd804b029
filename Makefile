# groundserve. `make` or `make help` lists the targets. CI runs the same targets as people do.
.DEFAULT_GOAL := help
.PHONY: help install up down test docker-test client-test slurm-test failover-test kubernetes-test check chaos bench bench-features bench-sizes bench-routing bench-autoscale simulate lock fuzz docs compiled compiled-test

# The first of these that runs (a version manager may have a stub for a Python that is not installed).
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
BIN := .venv/bin

# For make up: the model (smollm2 answers questions, tiny-llava names colours in images), and the number of replicas.
MODEL ?= smollm2
# Several, behind one endpoint: make up MODELS="smollm2 tiny-llava" REPLICAS=1
MODELS ?= $(MODEL)
REPLICAS ?= 2
SERVICES = $(patsubst smollm2-135m,smollm2,$(MODELS))
# Built once, here and not by the replicas, so that its progress can be seen.
EMBEDDED = $(filter smollm2-135m tiny-llava,$(patsubst smollm2,smollm2-135m,$(MODELS)))

# For make slurm-test: the Debian of its hosts. bookworm (12) has Slurm 22.05, trixie (13) has 24.11.
DEBIAN ?= bookworm

# Processes that share out make test. Most tests wait, so two processors are enough for three.
WORKERS ?= 3

help: ## show this list
	@echo "Settings: MODEL=$(MODEL) REPLICAS=$(REPLICAS) PYTHON=$(PYTHON) TESTS=$(TESTS) WORKERS=$(WORKERS)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## create .venv from the lock files if it is missing or out of date
	@test -n "$(PYTHON)" || { echo "make install: no Python found: install Python 3.11, or set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) .ci/install.py

up: install ## serve MODEL (or MODELS, behind one endpoint) with REPLICAS replicas on http://localhost:30001, on this machine, without Docker
	@for service in $(SERVICES); do test -f services/$$service.yaml || { echo "make up: no service for $$service; there are: $$(cd services && echo *.yaml | sed 's/\.yaml//g')" >&2; exit 1; }; done
	@$(BIN)/python -c 'import importlib.util as i, sys; i.find_spec("sglang") or sys.exit("make up: this Python has no SGLang: remove .venv and say make up PYTHON=/path/to/python3.11, or give groundserve up a file whose run: starts something else")'
	@$(if $(EMBEDDED),$(BIN)/python -m replica.models $(EMBEDDED))
	@$(BIN)/groundserve up $(SERVICES:%=services/%.yaml) --env REPLICAS=$(REPLICAS)

down: ## stop what make up started, and all other services that groundserve runs here
	@if [ -x $(BIN)/groundserve ]; then $(BIN)/groundserve down --all; else echo "nothing is installed, so nothing is running"; fi

test: install ## the tests that need no GPU, no Docker and no root, with the real SGLang (TESTS=tests/replica for a part)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(TESTS)

docker-test: install ## all tests of the images and compose.yaml; needs Docker, builds the images, takes minutes
	@docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 || { echo "make docker-test: no Docker engine with Compose v2 answers: start it, or get it from docs.docker.com/engine/install" >&2; exit 1; }
	@$(BIN)/python -m pytest -m docker --durations=5 tests/e2e/docker

client-test: install ## agents, SDKs and suites of others, against a real SGLang; needs Node, installs them once (ARGS="--only agents")
	@$(BIN)/python -m tests.clients $(ARGS)

slurm-test: install ## all tests on a real Slurm, on hosts made of namespaces; needs root and mmdebstrap, makes a Debian root once (DEBIAN=trixie)
	@$(BIN)/python -m replica.models smollm2-135m
	@LAB_DEBIAN=$(DEBIAN) $(BIN)/python -m tests.lab.slurm $(BIN)/python -m pytest -m slurm --durations=5 tests/e2e/slurm

failover-test: install ## move an address between two balancers on hosts made of namespaces; needs root and mmdebstrap
	@$(BIN)/python -m tests.lab.hosts --for tests.e2e.failover.test_failover $(BIN)/python -m pytest -m failover --durations=5 tests/e2e/failover

kubernetes-test: install ## all tests on a real Kubernetes, on such hosts; builds its programs once, from Debian's source (JOBS=4)
	@tests/lab/kubernetes/build.sh
	@$(BIN)/python -m tests.lab.hosts --for tests.lab.kubernetes.control_plane $(BIN)/python -m pytest -m kubernetes --durations=5 tests/e2e/kubernetes

check: install ## check formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

compiled: install ## compile what every request goes through into .compiled, for make compiled-test and make bench
	@.ci/compile

compiled-test: compiled ## the tests of the data path, on the compiled modules
	@cd .compiled && ../$(BIN)/python -m pytest tests/compiled.py $(or $(TESTS),tests/relay tests/routing tests/wire tests/workers)

fuzz: install ## send hostile bytes for a minute (ARGS="--seconds 600 --seed 7")
	@$(BIN)/python -m tests.wire.fuzz --seconds 60 $(ARGS)

chaos: install ## 1,000 seeded faults under load, with every promise checked after each (ARGS="--steps 100 --seed 7")
	@$(BIN)/python -m tests.chaos --steps 1000 $(ARGS)

bench: install ## measure the cost of relaying, next to nginx, Envoy and the Rust routers (ARGS="--rounds 1": quick)
	@$(BIN)/python -m tests.bench.relay $(ARGS)

bench-features: install ## measure the cost of metrics, keys and routing by prefix, next to a balancer without (ARGS=...)
	@$(BIN)/python -m tests.bench.features $(ARGS)

bench-sizes: install ## measure requests of 200 bytes to 1 MiB, TLS, 1,000 streams at once, up to 1,000 replicas (ARGS=...)
	@$(BIN)/python -m tests.bench.sizes $(ARGS)

bench-routing: install ## measure the gain of routing by prefix on two real replicas (ARGS=...)
	@$(BIN)/python -m tests.bench.routing $(ARGS)

bench-autoscale: install ## compare the autoscaler with SkyServe's own, in virtual time (ARGS="--only ramp jitter")
	@$(BIN)/python -m tests.bench.autoscale $(ARGS)

simulate: install ## simulate the routing policies in virtual time, next to others and an oracle (ARGS=--full)
	@$(BIN)/python -m tests.lab.simulate $(ARGS)

docs: install ## regenerate what docs/ takes from the code: the page of commands, the pictures
	@$(BIN)/python -m tests.docs

lock: ## regenerate the lock files (needs uv)
	@.ci/lock
