# A thin wrapper: every target prints the command that it runs. Nothing here deletes a harvested cache.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.granary

# make interop, make bench-peers: the peers' own environment
INTEROP_VENV  ?= .venv-interop
INTEROP_BIN   := $(INTEROP_VENV)/bin
INTEROP_STAMP := $(INTEROP_VENV)/.granary

# make docs: the documentation site's own environment
DOCS_VENV  ?= .venv-docs
DOCS_BIN   := $(DOCS_VENV)/bin
DOCS_STAMP := $(DOCS_VENV)/.granary

# make remote: s3fs and an S3 server
REMOTE_VENV   ?= .venv-remote
REMOTE_BIN    := $(REMOTE_VENV)/bin
REMOTE_STAMP  := $(REMOTE_VENV)/.granary

# make kernels: Triton (180 MB), in the version that torch of constraints.txt asks for where it is built for CUDA
TRITON        ?= 3.7.1
KERNELS_VENV  ?= .venv-kernels
KERNELS_BIN   := $(KERNELS_VENV)/bin
KERNELS_STAMP := $(KERNELS_VENV)/.granary

# make harvest, make train
TOKENS  ?=
DEVICE  ?=
ARGS    ?=
# make harvest
MODEL   ?= demo
LAYER   ?= 3
DATASET ?= Salesforce/wikitext
OUT     ?=
# make train
CACHE ?= cache/demo_l3
TYPE  ?= batchtopk
K     ?=

# The default dataset has several configurations; another DATASET brings its own.
CONFIG := $(if $(filter Salesforce/wikitext,$(DATASET)),--dataset-config wikitext-103-raw-v1)

.PHONY: help setup demo harvest train test test-all check regenerate docs bench interop remote bench-peers kernels clean

help:
	@echo "make setup | demo | harvest MODEL= LAYER= | train CACHE= TYPE= | test | test-all | check | regenerate | docs | bench | interop | remote | bench-peers | kernels | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): about 2 minutes, longer where torch is not at hand"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/sae-train demo

harvest: $(STAMP)
	$(BIN)/sae-harvest run --model $(MODEL) --layer $(LAYER) --dataset $(DATASET) --max-tokens $(or $(TOKENS),5M) $(strip $(CONFIG) $(if $(OUT),--out $(OUT)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS))

train: $(STAMP)
	$(BIN)/sae-train run --cache $(CACHE) --type $(TYPE) $(strip $(if $(K),--k $(K)) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS))

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

regenerate: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/generate_commands.py
	$(BIN)/python tests/golden_losses.py

$(DOCS_STAMP): docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r docs/requirements.txt
	@touch $@

# Warnings (a broken link, a page outside the navigation, an unknown cross-reference) are errors; no network is needed.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

$(INTEROP_STAMP): interop.txt pyproject.toml
	$(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep ^torch== interop.txt)
	$(INTEROP_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r interop.txt
	$(INTEROP_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

interop: $(INTEROP_STAMP)
	$(INTEROP_BIN)/python -m pytest -q -W default tests/interop_*.py $(ARGS)

$(REMOTE_STAMP): remote.txt pyproject.toml
	$(PYTHON) -m venv $(REMOTE_VENV)
	$(REMOTE_BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep ^torch== remote.txt)
	$(REMOTE_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r remote.txt
	$(REMOTE_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

remote: $(REMOTE_STAMP)
	$(REMOTE_BIN)/python -m pytest -q -W default tests/remote_*.py $(ARGS)

bench-peers: $(INTEROP_STAMP)
	$(INTEROP_BIN)/python -m benchmarks.peers $(ARGS)

$(KERNELS_STAMP): Makefile constraints.txt
	$(PYTHON) -m venv $(KERNELS_VENV)
	$(KERNELS_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(KERNELS_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$(TRITON)
	@touch $@

kernels: $(KERNELS_STAMP)
	$(KERNELS_BIN)/python -m pytest -q tests/test_kernels_*.py $(ARGS)

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
