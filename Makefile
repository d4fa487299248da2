# `make quickstart` and `make test` work on a fresh machine with Python, pip, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a file of tests in one of them: compilation, which most of the time goes to, runs on one core.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: quickstart test test-slow check format bench learning-table clean

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,notebooks]'
	touch $@

quickstart: $(VENV)/.run  ## train a small model from nothing and watch it learn
	rm -rf runs/quickstart
	$(BIN)/python -m rljax.main --config configs/quickstart.py

learning-table: $(VENV)/.run  ## every method on one small task, three seeds, with intervals; long
	$(BIN)/python -m benchmarks.learning_table

test: $(VENV)/.dev  ## what continuous integration runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rljax
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow" --durations=15

test-slow: $(VENV)/.dev  ## kills, processes, learning controls: before calling something done
	$(PYTEST) -m slow --durations=15

bench: $(VENV)/.run  ## the short benchmarks, and a table of them; one alone: python -m benchmarks.grpo_step --size s
	$(BIN)/python -m benchmarks

check: $(VENV)/.dev  ## the inner loop
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy rljax
	$(BIN)/lint-imports
	$(PYTEST) -m fast

clean:
	rm -rf $(VENV) runs build *.egg-info
