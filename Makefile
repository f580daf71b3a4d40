# Two commands do everything in a fresh clone: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
TESTS  ?= tests

.PHONY: demo test test-slow lint format bench clean

demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/onefold demo --out demo

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 1800 $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) demo

# The environment: exact versions from constraints.txt, the package itself as an editable install.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps --requirement tests/requirements-parity.txt
	touch $@
