# Each target makes its own virtual environment on a fresh machine. torch is installed first, in an exact version: on machines that offer a CPU
# build of it this is the one that is taken. triton goes with it: torch's CPU build does not ask for the release it was made for.
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv
BIN := $(VENV)/bin
# with a bar per download where somebody looks at a terminal
PIP = $(BIN)/python -m pip install --disable-pip-version-check $$(test -t 2 || echo --quiet)
HINT = command -v rcm >/dev/null || echo "to use rcm in this shell, type first: . $(BIN)/activate"

.PHONY: demo quick stream test test-all test-gpu lint install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml rcm/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	@echo "1 of 3: a virtual environment in $(VENV), some seconds"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "2 of 3: $(TORCH), 0.4 GB to download as a CPU build, 3 GB with CUDA"
	@$(PIP) $(TORCH)
	@echo "3 of 3: rcm with what it and its tests need, 0.2 GB to download; 2.5 GB on disk with a CPU build"
	@$(PIP) -e ".[test]"
	@touch $@
	@echo "installed in $(VENV)"

# All stages on the embedded world. Goes on where it was stopped; DEMO_ARGUMENTS=--fresh begins anew.
demo: install
	@$(BIN)/rcm demo $(DEMO_ARGUMENTS)
	@$(HINT)

# One method on the embedded world.
quick: install
	@$(BIN)/rcm demo --quick $(DEMO_ARGUMENTS)
	@$(HINT)

# A video from the shipped checkpoint.
stream: install
	@$(BIN)/rcm stream
	@$(HINT)

test test-all: export OMP_NUM_THREADS ?= 1
# many tests start an interpreter, which compiles the package anew where nothing keeps the result
test test-all: export PYTHONDONTWRITEBYTECODE :=

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-all: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Most of the time of GPU tests is compilation, on the CPU: eight processes share the card.
test-gpu: install
	$(BIN)/python -m pytest -n 8 -m "gpu and not slow"

lint: install
	$(BIN)/ruff check rcm scripts tests examples
	$(BIN)/ruff format --check --quiet rcm scripts tests examples
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
