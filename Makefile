# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
# While working: `make unit` leaves out what trains models or runs commands. Before a release: `make slow`, true shapes,
# which CI does not run. On a machine with a GPU: `make gpu`, its tests and benchmarks, in 20 minutes.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= demo
DEMO_FLAGS ?=
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: demo test lint types unit whole slow gpu clean

demo: .venv/train.stamp
	$(BIN)/czsl ablate --data shapes --encoder tiny --out $(DEMO_OUT) $(DEMO_FLAGS)

test: lint types whole

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

unit: .venv/dev.stamp
	$(BIN)/pytest -m "not engine and not slow and not gpu" $(PARALLEL)

whole: .venv/dev.stamp
	$(BIN)/pytest $(PARALLEL)

slow: .venv/dev.stamp
	$(BIN)/pytest -m slow tests/slow

gpu: .venv/dev.stamp
	$(BIN)/python -m benchmarks.gpu

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv $(DEMO_OUT)
