# Every target sets up what it needs in .venv and is quick the second time.
#
#   make demo    train on real handwritten digits, with and without batch normalisation
#   make test    the test suite
#   make lint    formatting, lint, types
#   make book    build the book into book/_build/html
#   make lab     open the book's chapters as notebooks
#   make bench   measure, write records, and make tables and plots from them
#   make clean   remove what the targets above have made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.setup

.PHONY: demo test lint book lab bench clean

demo: $(SETUP)/demo
	$(BIN)/python -m cubn demo

test: $(SETUP)/test
	$(BIN)/python -m pytest

lint: $(SETUP)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

book: $(SETUP)/book
	$(BIN)/python book/build.py

lab: $(SETUP)/book
	JUPYTER_CONFIG_DIR=book/lab $(BIN)/jupyter lab book

bench: $(SETUP)/bench
	$(BIN)/python benchmarks/run.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One mark per extra, older than pyproject.toml when it has to be installed again.
$(SETUP)/%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@mkdir -p $(SETUP)
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist book/_build cubn-demo
