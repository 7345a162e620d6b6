# Everything is installed into .venv; the only requirements are Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
AVALANCHE := .venv-avalanche
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help demo test lint reproduce bench bench-avalanche crash clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/demo  ## compare five methods on the embedded digits: table, plot and report, offline
	$(BIN)/perdure compare --out runs/demo

test: $(VENV)/test  ## all tests that need no download
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)/lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PROTOCOLS := der-split-mnist der-permuted-mnist vandeven-split-mnist

reproduce: $(VENV)/demo  ## published tables on real data (PERDURE_DATA, or after 'perdure data get mnist'): hours
	mkdir -p runs
	$(BIN)/perdure reproduce $(PROTOCOLS) --out docs/reproduced.md --json > runs/reproduced.json
	cp runs/reproduced.json src/perdure/experiments/reproduced.json

bench: $(VENV)/demo bench-avalanche  ## speed as ratios to loops by hand and to Avalanche: docs/performance.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.endless --json runs/endless.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --avalanche runs/avalanche.json --endless runs/endless.json \
		--out docs/performance.md

bench-avalanche: $(AVALANCHE)/ready  ## speed beside Avalanche alone, which gets an environment of its own
	mkdir -p runs
	OMP_NUM_THREADS=1 $(AVALANCHE)/bin/python -m benchmarks.avalanche --json runs/avalanche.json

crash: $(VENV)/demo  ## kill runs at random moments, resume them, compare every bit: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crash

clean:  ## remove the virtual environments and runs
	rm -rf $(VENV) $(AVALANCHE) runs

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

# torchvision without what it asks for: that would replace torch by the build that its wheel was made with.
$(AVALANCHE)/ready: BIN := $(AVALANCHE)/bin
$(AVALANCHE)/ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(AVALANCHE)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install --no-deps torchvision==0.28.0
	$(PIP) install -c constraints.txt avalanche-lib==0.6.0 -e .
	@touch $@
