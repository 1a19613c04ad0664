# Needs Python 3.11 or newer and make. Every target sets up what it needs in .venv.
PYTHON ?= python3
# Options of the demo (make demo DEMO=--quick).
DEMO ?=
# Options of both benchmarks (make bench BENCH=--reference-runs=1).
BENCH ?=
# Another Python (make test PYTHON=python3.12) has an environment of its own.
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test bench lint format clean

demo: $(VENV)/.run
	$(BIN)/jaxmech demo $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_path_patching.py --shape small --out out/bench_small.json $(BENCH)
	$(BIN)/python benchmarks/bench_methods.py --shape small --out out/bench_methods_small.json $(BENCH)
	$(BIN)/python benchmarks/report.py out/bench_small.json --chart out/bench_small.png
	$(BIN)/python benchmarks/report.py out/bench_methods_small.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* out build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@
