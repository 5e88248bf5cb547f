# make demo: the whole ladder on this machine. make test: the tests. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ifeq ($(strip $(HOME)),)
export HOME := /tmp
endif
# Whole files are dealt out to two processes, so that the tests of a file share its Ray cluster. 0: all tests in one process.
TEST_PROCESSES ?= 2

.PHONY: help venv demo test lint format clean

help:
	@echo "make demo   install into $(VENV), then run the whole ladder on this machine (about 10 minutes on 2 cores)"
	@echo "make test   install into $(VENV), then run the tests (TESTS=tests/analysis for some, TEST_PROCESSES=0 for one at a time)"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove $(VENV), caches and the demo's results"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; try: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (versions of constraints.txt) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: venv
	@$(BIN)/nanoladder demo

test: venv
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: venv
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: venv
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache *.egg-info
