# Everything that a checkout can do. `make` alone lists the targets.
# Python 3.11, 3.12 or 3.13 is found by running each candidate; name another with  make PYTHON=/path/to/python ...

VENV ?= .venv
PEERS_VENV ?= .venv-peers
WHEEL_VENV ?= .venv-wheel
DEMO_OUT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/emodistill/demo
DEMO_CONFIG ?= benchmarks/demo/demo.toml
PYTEST_ARGS ?=
BENCH_ARGS ?=

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	if command -v $$p >/dev/null && $$p -c "$(SUPPORTED)" 2>/dev/null; then echo $$p; break; fi; done)

BIN := $(VENV)/bin
# Tests of modules that need nothing but the base install: they run against the built wheel, with TensorFlow absent.
BASE_TESTS := $(addprefix test_,$(addsuffix .py,check data folds layers metrics submission thresholds tokenization))

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types wheel peers bench clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Create .venv and install emodistill with its train, parquet and dev extras, editable

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: install one, or run  make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { echo "$(PYTHON) cannot create environments: install its venv package (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --quiet --editable ".[train,parquet,dev]"
	@touch $@

demo: install ## Train, combine, distil and export on the shipped data: ends with the table, the bundle and submission.zip
	$(BIN)/emodistill run --config $(DEMO_CONFIG) --out "$(DEMO_OUT)"

test: install ## Run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint types wheel ## Format, lint, strict types, and the built wheel with the base install

format: install ## Rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The stages lie outside src/, so mypy reads the package as it is installed: see docs/adr/0001-package-layout.md.
types: install
	rm -rf .mypy_path build
	$(BIN)/python -m pip install --quiet --no-deps --target .mypy_path .
	rm -rf build
	MYPYPATH=.mypy_path $(BIN)/mypy --package emodistill

wheel: install
	rm -rf build dist $(WHEEL_VENV)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	rm -rf build
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet dist/*.whl pytest hypothesis
	cd tests && ../$(WHEEL_VENV)/bin/python -m pytest --quiet -p no:cacheprovider $(BASE_TESTS)
	cd tests && ../$(BIN)/python -c "from pathlib import Path; from bundles import write_bundle; write_bundle(Path('../build/bundle'))"
	@! $(WHEEL_VENV)/bin/python -c "import tensorflow" 2>/dev/null || { echo "the base install brings TensorFlow"; exit 1; }
	$(WHEEL_VENV)/bin/emodistill predict --model build/bundle "thank you" | grep gratitude
	rm -rf build

peers: $(PEERS_VENV)/.installed ## Create .venv-peers: PyTorch, optimum-onnx, onnxruntime-node (files are exchanged, nothing is a dependency)

$(PEERS_VENV)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/package.json
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	if command -v npm >/dev/null; then cd benchmarks/peers && npm install --silent --no-audit --no-fund; \
	else echo "no npm: the Node client check will be skipped"; fi
	@touch $@

bench: install peers ## Time the student against its peers, interleaved; make bench BENCH_ARGS="--bundle DIR --checkpoint DIR --texts FILE"
	$(BIN)/python -m emodistill.benchmarks.export_bench --peers-python $(PEERS_VENV)/bin/python $(BENCH_ARGS)

clean: ## Remove what the targets built, environments included
	rm -rf $(VENV) $(PEERS_VENV) $(WHEEL_VENV) .mypy_path build dist emodistill.egg-info benchmarks/peers/node_modules
