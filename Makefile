# `make demo` shows everything on a small scale. `make test` runs lint and tests, `make long` those that take seconds each
# and `make slow` those that take minutes. `make setup` only sets up the environment.
# Needs Python 3.11 to 3.13 and make; everything else is installed into .venv once, at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# one torch thread per test process: two processes with one thread each are faster than one process with two
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test long slow minimums setup clean

demo: setup
	@$(BIN)/safelight demo

test: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(TEST_ENV) $(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not long"

# what `make test` leaves out to stay within ten minutes, but for the slow tests
long: setup
	@$(TEST_ENV) $(BIN)/pytest -q -n 2 --dist loadfile -m "long and not slow"

slow: setup
	@$(TEST_ENV) $(BIN)/pytest -q -m slow

# The fast tests with the oldest versions that pyproject.toml allows. torch, whose download is gigabytes, stays at its
# pinned version; `make minimums PINNED=` takes its oldest one, too.
PINNED ?= torch
minimums: setup
	@$(TEST_ENV) $(BIN)/python -m tools.minimum_versions --pinned $(PINNED)

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "safelight needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	@echo "installing into $(VENV) (once; several minutes if torch must be downloaded)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)" setuptools
	@$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,parquet,heic,detector,optimizers,wandb]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info runs/demo
