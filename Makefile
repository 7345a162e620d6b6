# Everything is installed into .venv; the only requirements are Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help demo test lint reproduce bench crash clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/demo  ## compare five methods on the embedded digits: table, plot and report, offline
	$(BIN)/perdure compare --out runs/demo

test: $(VENV)/test  ## all tests that need no download
	$(BIN)/python -m pytest -q

lint: $(VENV)/lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PROTOCOLS := der-split-mnist der-permuted-mnist vandeven-split-mnist

reproduce: $(VENV)/demo  ## published tables on real data (PERDURE_DATA, or after 'perdure data get mnist'): hours
	$(BIN)/perdure reproduce $(PROTOCOLS) --out docs/reproduced.md

bench: $(VENV)/demo  ## speed as ratios to a hand-written loop
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

crash: $(VENV)/demo  ## kill runs at random moments, resume them, compare every bit: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crash

clean:  ## remove the virtual environment and runs
	rm -rf $(VENV) runs

# torch comes first and pinned: a looser requirement would take a build with gigabytes of GPU libraries.
$(VENV)/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "perdure needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[plot]'
	@touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) install -c constraints.txt -e '.[lint]'
	@touch $@
