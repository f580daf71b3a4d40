# Two commands do everything in a fresh clone: `make demo` and `make test`. `make test-all` is the rest: the slow tests, and
# every runtime that can be installed here, in an environment of its own (3 GB).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
TESTS  ?= tests
MARKS  ?= slow or not slow
PYTEST  = $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: docs demo test test-all test-everything lint format bench clean

demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/onefold demo --out demo

test: $(VENV)/.dev lint
	$(PYTEST) $(TESTS)

test-all:
	$(MAKE) VENV=.venv-runtimes test-everything

test-everything: $(VENV)/.runtimes
	ONEFOLD_NODE_MODULES=$(abspath $(VENV))/node_modules $(PYTEST) -m "$(MARKS)" --timeout 1800 $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, offline, in build/docs; a warning is an error.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .venv-runtimes demo

# The environment: exact versions from constraints.txt, the package itself as an editable install.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps --requirement tests/requirements-parity.txt
	touch $@

# Every runtime that can be installed on this system, beside all that .dev has; ONNX Runtime Web where there is npm.
$(VENV)/.runtimes: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev,executorch,litert,ncnn,mnn,coreml]"
	$(PIP) --no-deps --requirement tests/requirements-parity.txt
	! command -v npm || npm install --prefix $(VENV) --no-save --no-audit --no-fund --silent onnxruntime-web@1.30.0
	touch $@
