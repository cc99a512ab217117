# Everything sets itself up: a virtual environment, vLLM, this package. Later calls start at once.
#   make demo                 the trained demo pair with and without MSD; writes demo/report.html
#   make real                 a real language model, SmolLM2-135M, with and without MSD
#   make test                 all tests; TESTS=tests/unit for some of them, FAST=1 for short ones,
#                             WORKERS=1 for one after the other instead of one on each core
#   make soak                 the tests' long forms: hours; SOAK_ARGS=--resume goes on with a run
#   make lint                 ruff, and mypy over the rooms without vLLM
#   make docs                 the pages of docs/ as a site, in build/site
#   make check-033            the plugin and its tests against vLLM 0.33
#   DEVICE=gpu make demo      with vLLM's own wheels, on a machine with an accelerator
#   VENV=folder, PYTHON=python3.12: where the environment lies, and what it is made with

DEVICE ?= cpu
VENV ?= .venv
TESTS ?= tests
FAST ?=
WORKERS ?= logical
DEMO_ARGS ?=
SOAK_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(DEVICE)
READY_DOCS := $(VENV)/.ready-docs
VLLM_033_TESTS ?= tests/vllm

.PHONY: demo real test soak lint docs check-033 setup clean

demo: $(READY)
	$(BIN)/vllm-msd demo run $(DEMO_ARGS)

real: $(READY)
	$(BIN)/vllm-msd demo real $(DEMO_ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) $(if $(FAST),-m "not long") --durations=10 \
		--numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.soak $(SOAK_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

check-033: $(READY)
	folder=$$($(BIN)/python tools/overlay_033.py) && \
	$(BIN)/python -m vllm_msd.vllm_plugin.patches --check-source "$$folder" && \
	PYTHONPATH="$$folder$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(BIN)/python -m pytest $(VLLM_033_TESTS) --durations=10

setup: $(READY)

$(READY): pyproject.toml setup.py vllm_msd_startup.py tools/setup_venv.sh
	tools/setup_venv.sh "$(VENV)" "$(DEVICE)"
	touch $@

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip --disable-pip-version-check install --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
