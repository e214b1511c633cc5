# make demo | test | lint | types: each makes .venv by itself and can be run first. Needs Python >= 3.10, git and make.

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# The one place that chooses torch. With an NVIDIA driver: the CUDA build that pip finds. Without: the version that the
# CPU path is tested with. Where plain pip would fetch the CUDA build for a machine without a GPU, name the index of CPU
# wheels from PyTorch's install page:  make demo TORCH_INDEX=<address>
ifeq ($(shell nvidia-smi >/dev/null 2>&1 && echo yes),yes)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0
endif
TORCH_INDEX ?=

# The demo, and its short form for the CI: the same steps on fewer videos.
RECIPE     ?= tinyworld
DEMO_FLAGS ?=
SHORT_DIR  ?= runs/demo-short
SHORT_FLAGS ?= --output_dir $(SHORT_DIR) --data.tinyworld.train 6 --data.tinyworld.heldout 3 --train.sft.max_steps 2 \
               --eval.stages ends --eval.bootstrap 200

.PHONY: demo demo-short test lint types check clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    the whole method on tinyworld: runs/demo/report.html and runs/demo/summary.json"
	@echo "make test    all tests"
	@echo "make lint    ruff;  make types  mypy;  make check  what the CI runs, in full"

demo: $(VENV)/.demo
	$(BIN)/tempo-fast run $(RECIPE) $(DEMO_FLAGS)

demo-short: $(VENV)/.demo
	rm -rf $(SHORT_DIR)
	$(BIN)/tempo-fast run $(RECIPE) $(SHORT_FLAGS)

# Two processes, a file of tests at a time, torch with one thread in each. DeepSpeed would otherwise look for an
# accelerator of its own.
JOBS ?= 2
test: $(VENV)/.test
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

check:
	.ci/run

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Stamps: a second make installs nothing.
$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tempo-fast needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: | $(VENV)/.venv
	$(PIP) install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.demo: setup.py pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet -e ".[train,curate,report]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --quiet -e ".[dev,deepspeed,dali,ray]"
	@touch $@ $(VENV)/.lint

$(VENV)/.lint: | $(VENV)/.venv
	$(PIP) install --quiet "ruff==0.17.*"
	@touch $@
