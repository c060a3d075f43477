# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
# Without bytecode each process that a test starts would compile torch's source.
export PYTHONDONTWRITEBYTECODE :=
RUN := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(VENV)/bin

.PHONY: help install install-all test test-slow test-all slurm browser lint types check bench docs reference \
	demo demo-ablation demo-pretrained clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Locks are complete, so nothing is resolved; deepspeed alone comes as source. Bytecode is written at the first import.
INSTALL := $(VENV)/bin/pip install --quiet --no-deps --no-compile --only-binary :all: --no-binary deepspeed

install: $(VENV)/demo ## make .venv with what training and the demo need

$(VENV)/demo: requirements-demo.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements-demo.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install-all: $(VENV)/complete ## add what the tests need: databases, ONNX, LLM libraries, tools

$(VENV)/complete: requirements.lock $(VENV)/demo
	$(INSTALL) --requirement requirements.lock
	@touch $@

PYTEST := $(RUN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -rs --durations 20 $(PYTEST_OPTIONS)

test: install-all ## run the fast tests: under five minutes on two cores
	$(PYTEST)

test-slow: install-all slurm ## run the other tests; CONTRIBUTING.md names them
	$(PYTEST) -m slow

test-all: install-all slurm browser ## run all tests: under fifteen minutes on two cores
	$(PYTEST) -m 'slow or not slow'

slurm: ## install SLURM where that can be done: root and apt
	@command -v slurmctld > /dev/null || ! command -v apt-get > /dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends \
			slurm-wlm slurmctld slurmd slurm-client munge > /dev/null; } || true

browser: ## install Chromium where that can be done: root and apt
	@command -v chromium > /dev/null || ! command -v apt-get > /dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || true

lint: install-all ## check style
	$(VENV)/bin/ruff check .

types: install-all ## check types
	$(VENV)/bin/pyright

check: lint types test ## what to run before a commit; CI adds test-slow

demo: install ## train a search engine over the documentation of Python packages, from random weights
	$(VENV)/bin/python examples/demo.py

demo-ablation: install ## the demo, and stage 2 without stage 1 for comparison
	$(VENV)/bin/python examples/demo.py --ablation

demo-pretrained: install ## the same from a small pre-trained encoder, all-MiniLM-L6-v2
	$(VENV)/bin/python examples/demo.py --pretrained

bench: install-all ## measure loss, head, masks and gather
	PYTHONPATH=. $(RUN)/python benchmarks/bench.py

reference: install ## write what the documentation takes from the code
	PYTHONPATH=. $(VENV)/bin/python docs/generate_reference.py

docs: $(DOCS_VENV)/installed ## build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/installed: pyproject.toml # the extra `docs` alone: the site needs neither torch nor Lodestar
	$(PYTHON) -m venv $(DOCS_VENV)
	sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ',' | xargs $(DOCS_VENV)/bin/pip install --quiet
	@touch $@

clean: ## delete the environments, the demo's runs and what was built
	rm -rf $(VENV) $(DOCS_VENV) runs build
