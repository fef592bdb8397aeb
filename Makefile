# Two commands, each complete on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo docs test quick matrix lint upstream

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

# Without the tests that are marked slow.
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests

# The quick tests with the oldest and the newest PyTorch, and both releases of ASDL that are known. Downloads them.
matrix: $(INSTALLED)
	$(BIN)/python .ci/matrix.py

# The documentation, into build/site. The variable silences an advertisement of the theme's.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The patch series for ASDL: applied to the wheel patch by patch, tested, and the plugin's suite run against the result.
upstream: $(INSTALLED)
	$(BIN)/python patches/check.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: left to another package, pip may choose a build of several GB.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,examples]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps laplace-torch  # it pins an older ASDL
	touch $@
