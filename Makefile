# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= demo
DEMO_FLAGS ?=

.PHONY: demo test lint types unit clean

demo: .venv/train.stamp
	$(BIN)/czsl ablate --data shapes --encoder tiny --out $(DEMO_OUT) $(DEMO_FLAGS)

test: lint types unit

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

unit: .venv/dev.stamp
	$(BIN)/pytest --numprocesses auto --dist loadfile

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv $(DEMO_OUT)
