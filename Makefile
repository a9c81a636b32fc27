# Two commands do everything: `make demo` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STATE := .auditexport

.PHONY: help demo dev test test-all test-e2e lint format bench bench-quick chaos simulate simulate-coverage server lock clean

help:
	@echo "make demo    watch 100,000 events move from MySQL to ClickHouse, verified"
	@echo "make dev     the stack, the Dagster UI, and new events all the time"
	@echo "make test    the tests, on real servers, but for the slow ones"
	@echo "make test-all   all of them"
	@echo "make test-e2e   the Dagster UI in a headless browser, a deployment, Celery; pictures are in $(STATE)/e2e"
	@echo "make lint    ruff and mypy"
	@echo "make bench   speed beside the ancestor, latency, freshness and memory, on this machine (bench-quick: 5 minutes)"
	@echo "make simulate   random histories on simulated databases, thousands of them: SECONDS (600), SEED (1)"
	@echo "make simulate-coverage   what of core they ran, by lines and branches: HISTORIES (2000)"
	@echo "make chaos   random histories full of faults, for CHAOS_SECONDS (600) from CHAOS_SEED"

demo: $(READY) server
	@$(BIN)/auditexport demo

dev: $(READY) server
	@$(BIN)/auditexport dev

# CLICKHOUSE, MYSQLD and PYTEST_ARGS choose what the tests run on, and which; CONTRIBUTING.md has examples.
# More workers than cores, because many tests wait for locks and leases. With the variable set, each worker and each process
# that a test starts would compile every file anew.
unexport PYTHONDONTWRITEBYTECODE
test: SELECTED = -m 'not slow'
test test-all: $(READY) server
	@$(BIN)/python -m auditexport_tests.support.engines $(CLICKHOUSE)
	@AUDITEXPORT_TEST_CLICKHOUSE_ENGINE=$(CLICKHOUSE) $(if $(MYSQLD),AUDITEXPORT_MYSQLD='$(MYSQLD)') \
		$(BIN)/python -m pytest -n 5 --dist worksteal $(SELECTED) $(PYTEST_ARGS)

# The browser's tests, with what only they need; `make test` leaves them out.
test-e2e: $(READY) server
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[e2e]'
	@$(BIN)/python -m auditexport_tests.e2e.install
	@$(BIN)/python -m pytest auditexport_tests/e2e $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(READY) server
	@$(BIN)/python -m auditexport_tests.chaos

# PYTHONHASHSEED, because a seed must give the same history in each process.
simulate: $(READY)
	@PYTHONHASHSEED=0 SECONDS=$(or $(SECONDS),600) SEED=$(or $(SEED),1) HISTORIES=$(HISTORIES) $(BIN)/python -m auditexport_tests.simulation

# What of core the histories ran. In one process: a history's threads are counted together.
simulate-coverage: $(READY)
	@PYTHONHASHSEED=0 SEED=$(or $(SEED),1) HISTORIES=$(or $(HISTORIES),2000) $(BIN)/python -m auditexport_tests.simulation.coverage_of_core

bench: $(READY) server
	@$(BIN)/python -m auditexport_tests.benchmarks

bench-quick: $(READY) server
	@$(BIN)/python -m auditexport_tests.benchmarks --quick

# The virtual environment, from the pinned versions in constraints.txt.
$(READY): constraints.txt pyproject.toml
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned dependencies (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# A MySQL-family server binary: whatever is there, or Debian's MariaDB when we may install it.
server: $(READY)
	@$(BIN)/python -m auditexport_pipeline.local.install

lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --extra e2e --no-header pyproject.toml -o constraints.txt

clean:
	rm -rf $(STATE) $(VENV) .pytest_cache .mypy_cache .ruff_cache
