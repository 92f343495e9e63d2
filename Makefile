# A fresh machine needs python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup quickstart test check format pipeline mlflow-ui speed clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

setup: $(INSTALLED)  ## the virtual environment with everything in it

quickstart: $(INSTALLED)  ## the whole pipeline, four architectures, embedded data, no network, no Docker
	$(BIN)/python -m pipelines.run --config-name quickstart

test: $(INSTALLED)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(INSTALLED)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## rewrite the code as `check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pipeline: $(INSTALLED)  ## compile the pipeline to build/pipeline.yaml
	$(BIN)/python -m pipelines.compile build/pipeline.yaml

mlflow-ui: $(INSTALLED)  ## the MLflow pages of the runs on this machine
	$(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db --port $(or $(PORT),5000)

speed: $(INSTALLED)  ## time of each architecture beside its FLOPs, measured side by side
	$(BIN)/python -m benchmarks.speed

clean:  ## remove the environment and everything that runs wrote
	rm -rf $(VENV) build outputs
