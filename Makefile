# Two commands matter: `make demo` and `make test`. Both need Python >= 3.10 and pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-cycles test-slurm lint docs docs-serve clean

demo: $(VENV)/.installed-demo
	$(BIN)/equifeat demo --out demo_out

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# bpy pins its own NumPy and Python, so it lives in an environment of its own: docs/renderers.md.
CYCLES_PYTHON ?= $(HOME)/.local/share/equifeat/cycles/bin/python
test-cycles: $(VENV)/.installed-dev
	EQUIFEAT_CYCLES_PYTHON=$(CYCLES_PYTHON) $(BIN)/python -m pytest tests/data_prep/test_cycles.py

# Installs Debian's SLURM where it is missing and starts one of two nodes for the tests.
test-slurm: $(VENV)/.installed-dev
	eval "$$(tests/slurm/setup.sh)"; PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slurm tests/slurm; code=$$?; tests/slurm/setup.sh stop; exit $$code

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'equifeat needs Python 3.10 or newer, this is ' + sys.version.split()[0] + ': make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-demo: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/.installed-dev: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.installed-demo

# The documentation site, offline: site/index.html
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

clean:
	rm -rf $(VENV) demo_out .mypy_cache .ruff_cache .hypothesis site dist build
