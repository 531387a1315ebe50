# Every target sets up what it needs: a bare clone and python3 are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# one thread a process: the tests run side by side
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-all lint bench

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: setup
	$(BIN)/adapt demo

test: setup
	$(PYTEST) -m 'not slow'

test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .

bench: setup
	$(BIN)/python tests/benchmarks/bench.py
