# make demo   the main job on a fresh machine: set up .venv, install the embedded model, run `stepgraph demo`
# make test   set up .venv with the development tools and run all tests
# make dist   build what is released into dist/, and check it
# make image   build the container image, docs/container.md; TARGET=cuda for GPUs
# make docs    build the site of docs/ into build/site, and open every page of it
# make test-ranks   of these, the tests of models that several processes share
#
# Tests run in two processes with a thread each; choose another number with make test JOBS=4.
# Needs Python 3.11 or later and pip; choose another interpreter with make PYTHON=python3.12. Set-up happens once and again
# when pyproject.toml or constraints.txt change.

PYTHON ?= python3
JOBS ?= 2
BUILDER ?= docker
TARGET ?= cpu
VENV := .venv
BIN := $(VENV)/bin
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
DOCS := $(VENV)/.docs-installed
MODEL := $(VENV)/.model-installed
RANK_TESTS := tests/ranks tests/parallel tests/executor

.PHONY: help demo test test-ranks lint format typecheck dist docs docs-serve image clean
.NOTPARALLEL:  # two installations into one environment would get in each other's way

help:
	@echo "make demo       set up and run the demo"
	@echo "make test       set up and run the tests (make test PYTEST_FLAGS='-k attention')"
	@echo "make test-ranks set up and run the tests of models that several processes share, on the CPU"
	@echo "make lint       ruff: check style and format"
	@echo "make format     ruff: fix style and format"
	@echo "make typecheck  mypy"
	@echo "make dist       build archive and wheel into dist/ and check them, as they are released (see CONTRIBUTING.md)"
	@echo "make docs       build the site of docs/ into build/site, without a warning, and open every page and link of it"
	@echo "make docs-serve serve it at http://127.0.0.1:8001, and again whenever a page changes"
	@echo "make image      build the container image stepgraph:cpu, or with TARGET=cuda the one for GPUs"
	@echo "make clean      remove everything that was set up or built"

demo: $(MODEL)
	@$(BIN)/stepgraph demo

test: $(DEV) $(MODEL)
	@$(PYTEST) $(PYTEST_FLAGS)

test-ranks: $(DEV)
	@$(PYTEST) $(RANK_TESTS) $(PYTEST_FLAGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV)
	$(BIN)/mypy

dist: $(DEV) $(MODEL)
	@$(INSTALL) --editable '.[release]'
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/check_release.py $(RELEASE_FLAGS)

docs: $(DOCS)
	@$(MKDOCS) build
	@$(BIN)/python scripts/check_site.py

docs-serve: $(DOCS)
	@$(MKDOCS) serve --dev-addr 127.0.0.1:8001

image:
	version="$$(sed -n 's/^VERSION = "\(.*\)"/\1/p' stepgraph/version.py)" && \
	$(BUILDER) build --target $(TARGET) --tag stepgraph:$(TARGET) --tag "stepgraph:$$version-$(TARGET)" \
		--build-arg COMMIT="$$(git describe --always --abbrev=40 --exclude='*' --dirty=', changed')" --build-arg VERSION="$$version" $(IMAGE_FLAGS) .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON); install Python 3.11 or later, or" \
		"choose another interpreter: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: stepgraph needs Python 3.11 or later and \
	$(PYTHON) is " + sys.version.split()[0] + "; choose another interpreter: make PYTHON=python3.12")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing stepgraph, torch and transformers (once; this can take some minutes)"
	@$(INSTALL) --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the development tools"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(DOCS): $(RUNTIME)
	@echo "Installing what builds the site"
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(MODEL): | $(RUNTIME)
	@echo "Installing the model smollm2"
	@$(BIN)/stepgraph pull smollm2
	@touch $@
