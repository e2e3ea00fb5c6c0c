# One verb each; every verb sets up what it needs. Start with `make demo`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo s3 test test-all check format lock clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## the whole path on handwritten digits: about three minutes after the set-up
	$(BIN)/proxyrob run digits

s3: $(VENV)/.installed ## a real S3 server on loopback, for as long as you let it run (data below .venv/s3)
	$(BIN)/python -m tests.s3_server $(VENV)/s3

test: $(VENV)/.installed ## the tests, without those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-all: $(VENV)/.installed ## all tests, also those that train and attack for minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.installed ## lint, formatting, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/bin/uv ## resolve the dependencies anew into requirements.lock
	$(BIN)/uv pip compile --universal --generate-hashes --extra dev --extra bench --python-version 3.11 --no-header \
	  --no-emit-index-url --upgrade pyproject.toml -o requirements.lock

clean: ## remove the environment and caches (results in PROXYROB_HOME stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.installed: $(VENV)/bin/uv requirements.lock pyproject.toml
	@echo "installing the pinned dependencies into $(VENV) (about 6 GB, mostly torch with its CUDA libraries)"
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --compile-bytecode --requirements requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --no-deps --no-build-isolation --editable .
	@touch $@
