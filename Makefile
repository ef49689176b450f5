# Two commands do everything on a fresh machine: `make demo` and `make test`. Both begin with `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
SEEDS ?= 10000
SEED_BASE ?= 0
# Test processes, each with one thread to compute with, and one more than processors, since tests of clusters wait much of
# the time. Tests that share a cluster stay in one (tests/support/tiers.py).
TEST_PROCESSES ?= 3
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder
.PHONY: chart help lock setup demo up test test-long test-unit test-anywhere test-hosts test-image test-api-server clients soak chaos fuzz lint types proto bench bench-engine gpu-check model-check clean

help:
	@echo "make demo           start a local cluster, answer a short and a long prompt, stop"
	@echo "make up             start the same cluster and run it until Ctrl-C"
	@echo "make test           test every feature, without a GPU, in about ten minutes on two cores; a part: ARGS='tests/unit/router -k cache'"
	@echo "make test-long      the other tests: more seeds, sizes and kernels, long chaos runs, Ray under attack and faults, third-party clients"
	@echo "make test-unit      only the unit tests; fails if one of them takes long"
	@echo "make test-anywhere  run tests that could depend on the processor as on other processors (docs/batch-invariance.md)"
	@echo "make test-hosts     run a cluster on three hosts (network namespaces; as root), one of them cut off: a quiet quarter of an hour"
	@echo "make test-image     build the image for CPUs and run it as its user (as root, with buildah and mmdebstrap)"
	@echo "make test-api-server  install the chart on a real API server (KUBEBUILDER_ASSETS and DIPTYCH_TEST_CRDS say where: docs/kubernetes.md)"
	@echo "make soak           run clusters in virtual time under seeded faults (SEEDS=10000 SEED_BASE=0), then with planted bugs"
	@echo "make fuzz           run the fuzz tests for much longer, with new seeds"
	@echo "make chaos          inject faults into real clusters for longer: make chaos DURATION=600 FAULTS=100 SEED=7"
	@echo "make clients        test all third-party clients, also those that take long to install (docs/clients.md)"
	@echo "make setup          create the environment (.venv), nothing else"
	@echo "make lint types proto chart lock bench clean"
	@echo "make bench-engine   compare our engine with transformers and vLLM's CPU build, in one run"
	@echo "make gpu-check      on a machine with a GPU: check the engine's results and speed (needs no environment of ours)"
	@echo "make model-check    check the handoff protocol with the model checker spin (docs/handoff-model)"

setup: $(STAMP)

$(STAMP): requirements/torch.txt requirements/base.txt requirements/dev.txt requirements/nixl.txt requirements/triton.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Diptych needs Python 3.11 or later, $(PYTHON) is {v.major}.{v.minor}; set PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (1 of 5)"; $(BIN)/python -m pip install -q -r requirements/torch.txt
	@echo "installing dependencies (2 of 5)"; $(BIN)/python -m pip install -q -r requirements/torch.txt -r requirements/base.txt -r requirements/dev.txt
	@echo "installing NIXL (3 of 5)"; $(BIN)/python -m pip install -q --no-deps -r requirements/nixl.txt
	@echo "installing Triton, if torch brought none (4 of 5)"; $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q --no-deps -r requirements/triton.txt
	@echo "installing Diptych (5 of 5)"; $(BIN)/python -m pip install -q --no-deps -e .
	@$(BIN)/python -m engine.native.build
	@touch $@

demo: setup
	@$(BIN)/python -m deploy.demo

up: setup
	@$(BIN)/diptych up

test: setup
	@$(BIN)/diptych model
	$(PYTEST) -m "not long" $(ARGS)

# Ray takes a busy machine for a broken one, so what runs under it has the machine to itself.
NO_TESTS := 5
test-long: setup
	@$(BIN)/diptych model
	$(PYTEST) -m "long and not ray" $(ARGS) || [ $$? = $(NO_TESTS) ]
	$(BIN)/python -m pytest -m "long and ray" $(ARGS) || [ $$? = $(NO_TESTS) ]

test-unit: setup
	@$(BIN)/diptych model
	$(BIN)/python -m pytest tests/unit -m "not long" --unit-limit 3 $(ARGS)

test-hosts: setup
	DIPTYCH_TEST_HOSTS=1 $(BIN)/python -m pytest -s tests/cluster/test_scaled_hosts.py $(ARGS)

test-image: setup
	DIPTYCH_TEST_IMAGE=1 $(BIN)/python -m pytest -s tests/artefacts/test_image_built.py $(ARGS)

test-api-server: setup
	$(BIN)/python -m pytest tests/artefacts/test_api_server.py $(ARGS)

# Libraries and native kernels held to what other processors have, one after another.
test-anywhere: setup
	@$(BIN)/diptych model
	$(BIN)/python -m tests.support.anywhere $(ARGS)

soak: setup
	$(BIN)/python -m tests.scenarios.soak --seeds $(SEEDS) --seed-base $(SEED_BASE)
	$(BIN)/python -m tests.scenarios.mutants

fuzz: setup
	@$(BIN)/diptych model
	FUZZ=long $(BIN)/python -m pytest tests/fuzz --timeout 3600 $(ARGS)

# Faults at random moments; the same seed gives the same plan. DURATION: seconds of faults of every kind. FAULTS: how many
# that no answer may fail of.
chaos: setup
	@$(BIN)/diptych model
	CHAOS_DURATION=$(or $(DURATION),300) CHAOS_FAULTS=$(or $(FAULTS),100) CHAOS_SEED=$(or $(SEED),1) $(BIN)/python -m pytest tests/chaos -s $(ARGS)

clients: setup
	@$(BIN)/diptych model
	CLIENTS=all $(BIN)/python -m pytest tests/clients --timeout 1200 $(ARGS)

# Style, and that what is generated is current: in seconds here rather than after the tests.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m deploy.observability --check
	$(BIN)/python -m deploy.chart_files --check
	$(BIN)/python -m router.doors.http.fields --check
	$(BIN)/python -m pytest -q tests/unit/test_stubs.py

types: setup
	$(BIN)/pyright

# Regenerates the stubs; `make lint` fails when they differ from the .proto files.
proto: setup
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/diptych/*/*.proto

# What is generated of the Helm chart, and its manifests for each file of values (docs/kubernetes.md).
chart: setup
	$(BIN)/python -m deploy.chart_files
	$(BIN)/python -m tests.support.chart

# The image's packages with their hashes; after a pin has changed.
lock: setup
	$(BIN)/python requirements/lock.py

bench: setup
	@$(BIN)/diptych model
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.router

# Beside vLLM's CPU build: its environment (3.5 GB) is made by the first call.
bench-engine: setup
	@$(BIN)/diptych model
	python=$$(PYTHON=$(abspath $(BIN))/python sh benchmarks/vllm_env.sh) && \
		$(BIN)/python -m benchmarks.engine --vllm-python "$$python" $(ARGS)

# On the machine's own Python, which has torch built for its GPU; nothing is installed.
gpu-check:
	@PYTHONPATH=.:proto $(PYTHON) -m benchmarks.gpu_check $(ARGS)

# Standard library only; says what to install, and exits 2, when spin or a C compiler is missing.
model-check:
	@$(PYTHON) docs/handoff-model/check.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
