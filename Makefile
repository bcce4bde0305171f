# Everything a contributor runs. The first target that needs it builds .venv from requirements.lock.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
KAFKA_PORT ?= 9092
ARGS ?=
# Most tests wait for a session, a broker or a process to start. TEST_JOBS=3 saves a few minutes more; 0: one by one.
TEST_JOBS ?= 2
COUNT ?= 10000
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test simulate soak check format bench kafka lock docs clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Stream real flight departures through agents on the embedded log
	@$(BIN)/python examples/flights.py $(ARGS)

test: $(READY)  ## Run the whole test suite (ARGS="-k name" narrows it)
	@$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(ARGS)

soak: $(READY)  ## Workers with tables under faults, 30 minutes and 10 M records; CHAOS=all or kill,cut,...: the chaos suite
	@$(BIN)/python -m tests.soak $(if $(CHAOS),--chaos $(CHAOS)) $(ARGS)

simulate: $(READY)  ## Simulate 10,000 runs with faults (COUNT=, JOBS=), or SEED=n once more, told step by step
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--count $(COUNT) --jobs $(JOBS))

check: $(READY)  ## Format, lint, types, layers and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layers.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)  ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Measure StreamFlow beside its peers on a real broker
	@benchmarks/run.sh $(ARGS)

kafka: $(READY)  ## Run a real Kafka broker for development (KAFKA_PORT=9092) until Ctrl-C
	@$(BIN)/python -m tests.kafka.broker --port $(KAFKA_PORT)

docs: $(READY)  ## Serve the documentation while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## Remove everything that was built; .venv too
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis site dist build

# uv writes the lock, both uv and pip read it. No registry's address is recorded in it.
lock:  ## Resolve requirements.lock anew from pyproject.toml (needs uv; LOCK_ARGS=--upgrade for new versions)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --extra dev --extra docs $(LOCK_ARGS) \
	    --quiet --output-file requirements.lock pyproject.toml

# The project itself is installed without its dependencies and without a build environment: all come from the lock.
# (`set -e`, since the make of macOS does not know .SHELLFLAGS.)
$(READY): requirements.lock pyproject.toml
	@set -e; \
	if command -v uv >/dev/null 2>&1; then \
	    echo "Setting up .venv with uv ..."; \
	    uv venv --quiet --allow-existing --python '$(if $(filter python3,$(PYTHON)),>=3.11,$(PYTHON))' .venv; \
	    uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock; \
	    uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .; \
	else \
	    echo "Setting up .venv with $(PYTHON) and pip ..."; \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("StreamFlow needs Python 3.11 or newer and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % sys.version_info[:2])'; \
	    $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .; \
	fi
	@touch $@
