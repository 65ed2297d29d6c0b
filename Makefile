# `make quickstart` and `make test` are all that a fresh machine needs: each makes the environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test check style matrix reference

quickstart: $(VENV)/.ready
	$(BIN)/tfast quickstart

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/tfast list --update README.md
	$(BIN)/python docs/make_api.py

matrix:
	PYTHON=$(PYTHON) bash .ci/matrix

reference: $(VENV)/.ready
	$(BIN)/python docs/make_api.py

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
