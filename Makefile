# Two commands matter: `make quickstart` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow test-peft lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s2ft needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/s2ft quickstart

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m 'not slow' -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

# PEFT's own tests with S2FT in place of its methods: three minutes
test-peft: setup
	$(BIN)/python tests/peft_suite/run.py

clean:
	rm -rf .venv build *.egg-info
