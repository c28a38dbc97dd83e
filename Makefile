# The newcomer's two commands are `make demo` and `make test`; both set up everything they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check
# The torch of the lock, which holds what its Linux wheels ask for, too (triton, CUDA); a CPU build of it, 2.13.0+cpu, goes as well.
TORCH ?= torch==2.13.0

.PHONY: demo test border test-newest check format slow setup lock clean

demo: setup
	$(BIN)/ssa demo

test: setup
	$(BIN)/python -m pytest -n 2

border: setup
	$(BIN)/python tests/border/overlay.py oldest newest

test-newest: setup
	$(BIN)/python tests/border/overlay.py released

slow: setup
	$(BIN)/python -m pytest -m slow -n 0

check: setup
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Pass one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt hatchling editables setuptools  # what builds us, and what builds packages that come as sources alone
	$(PIP) -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Writes constraints.txt: the newest releases that pyproject.toml admits beside that torch, on every Python from 3.11 on and every system.
lock:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade --target $(VENV)/uv uv
	echo '$(TORCH)' | PYTHONPATH=$(VENV)/uv $(BIN)/python -m uv pip compile - pyproject.toml --extra dev --universal --python-version 3.11 \
		--upgrade --quiet --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
