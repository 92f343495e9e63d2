"""A small data folder and settings that train on it in seconds."""

import logging
import os

import pytest

# Before the hub libraries are imported: tests never reach out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.models.routing import Router
from dynamic_transformers.models.selection import select_mask

DATA = {
    "dataset_configs": [{"name": "math", "path": "embedded"}],
    "vocab_size": 300,
    "block_size": 32,
    "batch_size": 4,
    "max_tokens": 4000,
    "max_eval_tokens": 1000,
    "cloze_examples": 4,
    "arithmetic_examples": 4,
}

MICRO_KEYS = (
    "vocab_size",
    "block_size",
    "max_tokens",
    "max_eval_tokens",
    "cloze_examples",
    "arithmetic_examples",
)


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command that a test runs in this process logs to that test's streams, which are closed after it."""
    logger = logging.getLogger("dynamic_transformers")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def micro_overrides():
    """Command-line overrides for a model and data that take seconds; sources stay as configured."""
    return ("model.size=micro", *(f"data.{key}={DATA[key]}" for key in MICRO_KEYS))


@pytest.fixture(scope="session")
def paper_overrides():
    """Command-line overrides with which `paper` takes seconds; sources and model stay as configured."""
    return (
        "data.block_size=64",
        "data.batch_size=2",
        "data.max_eval_tokens=500",
        "data.cloze_examples=0",
        "data.arithmetic_examples=0",
        "model.capacity_warmup_steps=1",
        "training.max_flops=null",
        "training.max_steps=2",
        "training.gradient_accumulation_steps=1",
        "tracking.mlflow=false",
        "system.device=cpu",
        "evaluation.tasks=[quick_test]",
    )


@pytest.fixture(scope="session")
def make_settings(tmp_path_factory):
    """Settings of a micro run; keyword arguments are `group={key: value}`."""
    output_dir = str(tmp_path_factory.mktemp("outputs"))

    def make(architecture="standard", **groups):
        size = None if groups.get("model", {}).get("pretrained") else "micro"
        values = {
            "run": {"name": architecture, "output_dir": output_dir},
            "model": {"type": architecture, "size": size, "surprise": {"beta_warmup_steps": 2}},
            "data": dict(DATA),
            "training": {"log_every": 1},
            "tracking": {"mlflow": False},
            "system": {"device": "cpu"},
        }
        for group, entries in groups.items():
            values[group] = values.get(group, {}) | entries
        if not {"max_steps", "max_tokens", "max_flops"} & set(values["training"]):
            values["training"]["max_steps"] = 6
        return settings_from_dict(values)

    return make


@pytest.fixture(scope="session")
def data_dir(make_settings, tmp_path_factory):
    return prepare(make_settings(), tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def given_selection(monkeypatch):
    """Makes routed layers select by recorded masks (rows, tokens), one for each layer, in place of a rule."""

    def give(model, masks):
        layers = {id(model.model.routers[str(layer)]): mask for layer, mask in masks.items()}

        def select(router, scores, hidden_states, context, state):
            return select_mask(layers[id(router)][:, context.past : context.past + scores.shape[1]])

        monkeypatch.setattr(Router, "select", select)

    return give
