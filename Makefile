# A fresh machine needs python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup quickstart test check format pipeline build-images push-images run-docker submit mlflow-ui speed clean

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

pipeline: $(INSTALLED)  ## compile the pipeline to build/pipeline.yaml; CLUSTER=cluster/example.yaml
	$(BIN)/python -m pipelines.compile build/pipeline.yaml --cluster "$(CLUSTER)"

build-images: $(INSTALLED)  ## the images of the steps and of the MLflow server; REGISTRY= TAG= BASE_IMAGE= TORCH_INDEX_URL=
	$(BIN)/python -m pipelines.images build --registry "$(REGISTRY)" --tag "$(TAG)" \
		--base-image "$(BASE_IMAGE)" --torch-index-url "$(TORCH_INDEX_URL)"

push-images: $(INSTALLED)  ## push them to the REGISTRY that they were built with, and record their digests for `make pipeline`
	$(BIN)/python -m pipelines.images push

run-docker: $(INSTALLED)  ## the pipeline of `quickstart`, each step in its container; ARGS="key=value ..."
	$(BIN)/python -m pipelines.run --docker --config-name quickstart run.name=docker $(ARGS)

submit: $(INSTALLED)  ## submit the pipeline to Kubeflow Pipelines; KFP_HOST=https://... CLUSTER= ARGS="--wait key=value ..."
	$(BIN)/python -m pipelines.submit --host "$(KFP_HOST)" --cluster "$(CLUSTER)" $(ARGS)

mlflow-ui: $(INSTALLED)  ## the newest comparison in MLflow, every variant in its charts; PORT=
	$(BIN)/python -m dynamic_transformers.tracking.ui --port $(or $(PORT),5000)

speed: $(INSTALLED)  ## time of each architecture beside its FLOPs, measured side by side
	$(BIN)/python -m benchmarks.speed

clean:  ## remove the environment and everything that runs wrote
	rm -rf $(VENV) build outputs
