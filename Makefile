# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3 2>/dev/null))
TORCH_INDEX_URL ?=
STORE ?= artifacts
RECIPE ?= smollm2_135m_instruct_lora_tickets_e3
PORT ?=
AUTH ?=
DATABASE_URL ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := .venv/.ready
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# One OpenMP thread a process in tests: two collapse when both cores are busy.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DO_NOT_TRACK=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: help demo up down test test-fast chaos screenshots lint format env clean

help:
	@echo "make demo       fine-tune, judge and try a real model on this machine's CPU"
	@echo "make up         Prefect's server, worker and schedules on this machine; PORT=... AUTH=user:password DATABASE_URL=postgresql+asyncpg://..."
	@echo "make down       stop exactly those"
	@echo "make test       every test       make test-fast   without the slow ones"
	@echo "make chaos      kill -9 everything in every stage (twenty minutes)"
	@echo "make screenshots  pictures of Prefect's pages for the docs, with Chromium"
	@echo "make lint       ruff, pyright    make format      ruff format"
	@echo "make clean      remove the environments (artifacts stay)"
	@echo "TORCH_INDEX_URL=...  where pip finds torch, for the small CPU build say"

demo: env
	$(BIN)/xtuner run $(RECIPE) --store $(STORE)

# The passwords go by the environment: arguments can be read by others on this machine. They go by these names only: make would also
# hand on its own AUTH and DATABASE_URL, which every run and its training would inherit.
unexport AUTH DATABASE_URL
up: export XTUNER_AUTH := $(AUTH)
up: export XTUNER_DATABASE_URL := $(DATABASE_URL)
up: env
	@$(BIN)/xtuner up --recipe $(RECIPE) --store $(STORE) $(if $(PORT),--port $(PORT))

down: $(READY)
	@$(BIN)/xtuner down

test: env
	@$(BIN)/xtuner env create lmdeploy --without-cuda $(if $(TORCH_INDEX_URL),--torch-index-url $(TORCH_INDEX_URL)) > /dev/null
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

# One after the other: each cell starts and kills parts of the same service.
chaos: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest tests/chaos -m chaos

# A service of its own with tiny runs; about three minutes.
screenshots: $(READY)
	$(BIN)/python docs/screenshots.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Both environments: ours, and OpenCompass's, whose pins contradict ours.
env: $(READY)
	@$(BIN)/xtuner env create opencompass $(if $(TORCH_INDEX_URL),--torch-index-url $(TORCH_INDEX_URL)) > /dev/null

# torch first: any later request for it would be answered with another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@echo "creating .venv with $(PYTHON) (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf .venv .environments
