# Every target sets up what it needs in .venv and is quick the second time.
#
#   make demo    train on real handwritten digits, with and without batch normalisation
#   make test    the test suite
#   make test-cupy  the real CuPy over a stand-in for the driver, without a GPU; CUPY=13.6 takes another version
#   make lint    formatting, lint, types
#   make book    build the book into book/_build/html
#   make lab     open the book's chapters as notebooks
#   make check-book  open every page of the built book in headless Chromium (Debian: chromium, fonts-dejavu-core)
#   make mutants break the CUDA kernels one place at a time and see the tests notice; ONLY=moments.cu takes one file
#   make bench   measure, write records, and make tables and plots from them
#   make clean   remove what the targets above have made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CUPY   ?= 14.2
SETUP  := $(VENV)/.setup

.PHONY: demo test test-cupy lint book check-book lab mutants bench clean

demo: $(SETUP)/demo
	$(BIN)/python -m cubn demo

test: $(SETUP)/test
	$(BIN)/python -m pytest -n logical --dist loadfile

test-cupy: $(SETUP)/cupy-$(CUPY)
	PYTHONPATH=tests $(VENV)/cupy-$(CUPY)/bin/python -m pytest -p driver.plugin -n logical --dist worksteal \
	    tests/test_driver.py tests/test_gpu.py

lint: $(SETUP)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

book: $(SETUP)/book
	$(BIN)/python book/build.py

check-book: book $(SETUP)/browser
	$(BIN)/python tests/book/check.py book/_build/html --axe book/node_modules/axe-core/axe.min.js

lab: $(SETUP)/book
	JUPYTER_CONFIG_DIR=book/lab $(BIN)/jupyter lab book

mutants: $(SETUP)/test
	PYTHONPATH=tests $(BIN)/python -m host.mutants cuda_mutants:subjects --kinds barriers bounds conditions \
	    $(if $(ONLY),--only $(ONLY))

bench: $(SETUP)/bench
	$(BIN)/python benchmarks/run.py
	if $(BIN)/python -c 'import torch' 2>/dev/null; then $(BIN)/python benchmarks/torch_layers.py; fi

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One mark per extra, older than pyproject.toml when it has to be installed again.
$(SETUP)/%: pyproject.toml book/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]' --constraint book/constraints.txt
	@mkdir -p $(SETUP)
	@touch $@

# In an environment of its own: with CuPy in .venv, all that asks whether there is a GPU would ask CuPy.
$(SETUP)/cupy-%: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/cupy-$*
	$(VENV)/cupy-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda13]' \
	    'cupy-cuda13x==$*.*' ml_dtypes pytest pytest-xdist hypothesis
	@mkdir -p $(SETUP)
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist book/_build cubn-demo
