"""The page and the picture of which tokens were computed."""

import subprocess
import sys

import pytest
import torch

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.evaluation.routing_page import trace_routing
from dynamic_transformers.export import export
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.trainer import train


@pytest.fixture(scope="module")
def exported(make_settings, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    run_dir = train(make_settings("mod", model={"capacity": 0.5}), data_dir, folder / "run")
    return export(run_dir, folder / "model", data_dir)


def test_the_trace_is_what_the_model_computed(exported, data_dir):
    from dynamic_transformers.evaluation.exported import load_model

    model, tokenizer = load_model(exported), load_tokenizer(data_dir)
    ids = tokenizer("12 + 7 = 19\nSo <b> π is 3.")["input_ids"]
    routing = trace_routing(model, tokenizer, ids)
    assert "".join(routing.tokens) == "12 + 7 = 19\nSo <b> π is 3."
    computed = {}
    for layer in (1, 3):
        block = model.model.layers[layer]
        block.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: computed.update({layer: kwargs["position_ids"][0].tolist()}),
            with_kwargs=True,
        )
    model(input_ids=torch.tensor([ids]), use_cache=False)
    for layer in (1, 3):
        places = [i for i, chosen in enumerate(routing.layers[layer]) if chosen]
        assert places == computed.get(layer, [])


def test_the_command_writes_page_and_picture(exported, tmp_path):
    command = [sys.executable, "-m", "dynamic_transformers.cli", "routing", "--model_path", str(exported)]
    result = subprocess.run(
        [*command, "--text", "a <b> & c = 4", "--output_dir", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "routing.html").read_text()
    assert "&lt;" in page and "<b>" not in page and page.count("<h2>") == 3
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_has_no_routing_to_show(make_settings, data_dir):
    from dynamic_transformers.training.build import build_model

    tokenizer = load_tokenizer(data_dir)
    with pytest.raises(UserError, match="routes nothing"):
        trace_routing(build_model(make_settings("standard"), 300), tokenizer, [1, 2])
