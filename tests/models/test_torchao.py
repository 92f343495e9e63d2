"""Weight-only quantisation by torchao, which `.ci/run` installs elsewhere: it slows imports."""

import pytest
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.models.tiny import PREDICTOR, ROUTED, calibrated, logits, tokens


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_quantised_model_routes_with_exact_weights(architecture, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    options = PREDICTOR[architecture]
    rule = {"selection_rule": "predictor"} if options else {}
    model, ids = calibrated(architecture, **options, **rule), tokens(2, 24)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert type(quantised.model.layers[1].mlp.up_proj.weight) is quantization.Int8Tensor
    exact = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*quantised.named_parameters(), *quantised.named_buffers()):
        if "routers." in name or "routing_state." in name:
            assert value.equal(exact[name]), name
    difference = (logits(quantised, ids) - logits(model, ids)).abs().mean()
    assert 0 < difference < 0.1 * logits(model, ids).abs().mean()
    quantised.generate(ids[:, :6], max_new_tokens=4, do_sample=False)
