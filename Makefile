# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
PEERS_VENV := .venv-peers
MINIMUM_VENV := .venv-minimum
PYTHON_VENV := .venv-python
# Without bytecode each process that a test starts would compile torch's source.
export PYTHONDONTWRITEBYTECODE :=
RUN := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(VENV)/bin

.PHONY: help install install-all test test-slow test-all test-minimum test-pythons slurm browser lint types check bench \
	bench-gpu bench-peers soak conformance docs reference demo demo-ablation demo-pretrained clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Locks are complete, so nothing is resolved; deepspeed alone comes as source. Bytecode is written at the first import.
# uv does not read pip's configuration and could choose another build of torch, so pip installs torch.
PIP := $(VENV)/bin/pip install --quiet --no-compile
UV := $(shell command -v uv)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(VENV)/bin/python,$(PIP)) \
	--no-deps --only-binary :all: --no-binary deepspeed

install: $(VENV)/demo ## make .venv with what training and the demo need

$(VENV)/demo: requirements-demo.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	grep '^torch==' requirements-demo.lock | $(PIP) --no-deps --requirement /dev/stdin
	grep -v '^torch==' requirements-demo.lock | $(INSTALL) --requirement /dev/stdin
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install-all: $(VENV)/complete ## add what the tests need: databases, ONNX, LLM libraries, tools

$(VENV)/complete: requirements.lock $(VENV)/demo
	$(INSTALL) --requirement requirements.lock
	@touch $@

# Three at a time on two cores: some tests wait.
PYTEST := $(RUN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -rs --durations 20 $(PYTEST_OPTIONS)

test: install-all ## run the fast tests: under five minutes on two cores
	$(PYTEST)

test-slow: install-all slurm ## run the other tests; CONTRIBUTING.md names them
	$(PYTEST) -m slow

test-all: install-all slurm browser ## run all tests: fifteen minutes on two cores
	$(PYTEST) -m 'slow or not slow'

# torch 2.11, the lowest, may come as a CUDA build of gigabytes: MINIMUM_TORCH=2.11.0 tests it. tests/conformance is about
# the locked versions of other packages.
MINIMUM_TORCH ?= 2.13.0
MINIMUM_TESTS ?= tests/unit tests/databases tests/recipes tests/e2e/test_families.py tests/distributed/test_muon.py

test-minimum: $(MINIMUM_VENV)/installed ## run most tests with the lowest versions that pyproject.toml allows
	PYTHONPATH=. $(subst $(VENV),$(MINIMUM_VENV),$(RUN))/python -m pytest $(MINIMUM_TESTS)

$(MINIMUM_VENV)/installed: pyproject.toml tests/lowest_versions.py
	$(PYTHON) -m venv --clear $(MINIMUM_VENV)
	$(PYTHON) tests/lowest_versions.py | sed 's/^torch==.*/torch==$(MINIMUM_TORCH)/' \
		| $(MINIMUM_VENV)/bin/pip install --quiet --only-binary :all: --no-binary deepspeed --requirement /dev/stdin
	@touch $@

# What needs no torch: the sources compile, recipes load or are refused, plans are computed.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCH_FREE := $(addprefix tests/unit/,test_architecture.py lodestar/config lodestar/planning/test_plan.py \
	lodestar/test_errors.py lodestar/test_files.py)

test-pythons: ## run what needs no torch on several Pythons, PYTHONS="python3.10 python3.13"
	set -e; new=$(PYTHON_VENV)/bin/python; for python in $(PYTHONS); do \
		$$python -m venv --clear $(PYTHON_VENV); \
		$$new -m pip install --quiet datasets psutil pydantic pytest pyyaml rich safetensors; \
		$$new -m compileall -qf contrastive examples launch lodestar retrieval retromae tests; \
		$$new -m pytest $(TORCH_FREE); \
		$$new -m lodestar pretrain --config configs/pretrain/24gpu.yaml --plan 24 > /dev/null; \
		$$new -m lodestar finetune --config configs/finetune/48gpu.yaml --plan 48 > /dev/null; \
		for command in encode evaluate export index merge mine search; do \
			$$new -m lodestar $$command --help > /dev/null; done; done

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

bench-peers: install-all $(PEERS_VENV)/installed ## measure steps and encoding beside other packages
	PYTHONPATH=. $(RUN)/python benchmarks/peers.py $(BENCH_OPTIONS)

bench: install-all ## measure loss, head, masks and gather
	PYTHONPATH=. $(RUN)/python benchmarks/bench.py

bench-gpu: ## measure both recipes on a GPU, under eight minutes: build/gpu/gpu.md; PYTHON needs torch and transformers alone
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out build/gpu

soak: install-all ## kill and stop runs at random moments: 20 kills of each of four kinds, 100 stops in all, an hour
	PYTHONPATH=. $(RUN)/python benchmarks/soak.py $(SOAK_OPTIONS)

conformance: install-all $(if $(PEERS),$(PEERS_VENV)/installed) ## losses beside other packages'; PEERS=1 adds FlagEmbedding
	PYTHONPATH=. $(RUN)/python -m tests.conformance.table $(if $(PEERS),$(PEERS_VENV)/bin/python)

# FlagEmbedding needs transformers below 5, and imports datasets and peft. RetroMAE's own code came with its version 1.2.
$(PEERS_VENV)/installed: Makefile
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet torch==2.13.0 'transformers<5' datasets peft
	$(PEERS_VENV)/bin/pip install --quiet --no-deps FlagEmbedding==1.4.2
	$(PEERS_VENV)/bin/pip install --quiet --no-deps --target $(PEERS_VENV)/retromae \
		FlagEmbedding==1.2.11 transformers==4.44.2 tokenizers==0.19.1
	@touch $@

reference: install ## write what the documentation takes from the code
	PYTHONPATH=. $(VENV)/bin/python docs/generate_reference.py

docs: $(DOCS_VENV)/installed ## build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/installed: pyproject.toml # the extra `docs` alone: the site needs neither torch nor Lodestar
	$(PYTHON) -m venv $(DOCS_VENV)
	sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ',' | xargs $(DOCS_VENV)/bin/pip install --quiet
	@touch $@

clean: ## delete the environments, the demo's runs and what was built
	rm -rf $(VENV) $(DOCS_VENV) $(PEERS_VENV) $(MINIMUM_VENV) $(PYTHON_VENV) runs build
