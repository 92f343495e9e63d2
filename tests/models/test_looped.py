"""The looped model against a Qwen2 with each of its passes written out."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dynamic_transformers.configure import compose_settings, settings_from_dict
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from dynamic_transformers.study import study_runs
from dynamic_transformers.training.build import build_model, model_config
from dynamic_transformers.training.flops import forward_flops, training_flops
from tests.models.tiny import BACKBONE, VOCAB, logits, tiny_model, tokens

SHAPES = [
    {"num_hidden_layers": 6},
    {"num_hidden_layers": 8, "passes": 3},
    {"num_hidden_layers": 6, "passes": 3, "prelude": 0, "coda": 0},
    {"num_hidden_layers": 5, "passes": 2, "prelude": 2, "coda": 1},
]


def unrolled(model):
    """Qwen2 with a layer for each pass, and the looped model's name of each of its parameters."""
    options = BACKBONE | {"num_hidden_layers": model.config.num_hidden_layers}
    dense = Qwen2ForCausalLM(Qwen2Config(**options)).train(model.training)
    names = {name: name for name, _ in dense.named_parameters()}
    for place, layer in enumerate(model.config.schedule):
        for name in names:
            if name.startswith(f"model.layers.{place}."):
                names[name] = name.replace(f"layers.{place}.", f"layers.{layer}.", 1)
    own = dict(model.named_parameters())
    dense.load_state_dict({name: own[source].detach() for name, source in names.items()}, strict=False)
    return dense, names


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_all_passes_written_out(shape):
    model, ids = tiny_model("looped", **shape), tokens(2, 24)
    dense, names = unrolled(model)
    assert torch.equal(logits(model, ids), logits(dense, ids))
    for either in (model, dense):
        either(input_ids=ids, labels=ids).loss.backward()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in dense.named_parameters():
        expected[names[name]] += parameter.grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_schedule_repeats_the_middle():
    config = tiny_model("looped", num_hidden_layers=8, passes=3, prelude=2, coda=0).config
    assert config.schedule == [0, 1, 2, 3, 2, 3, 2, 3] and config.distinct_layers == 4


def test_one_pass_is_the_standard_model_of_the_same_seed():
    looped, standard = tiny_model("looped", passes=1), tiny_model("standard")
    assert looped.state_dict().keys() == standard.state_dict().keys()
    assert torch.equal(logits(looped, tokens(2, 24)), logits(standard, tokens(2, 24)))


def test_each_pass_has_keys_and_values_of_its_own():
    model, ids = tiny_model("looped", num_hidden_layers=6).eval(), tokens(1, 12)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 6
    first, second = cache.layers[1].keys, cache.layers[3].keys  # both of layer 1
    assert not torch.allclose(first, second, atol=1e-2)


def converted(folder, make_settings, passes):
    return build_model(
        make_settings(
            "looped",
            model={"pretrained": str(folder), "looped": {"passes": passes}},
            data={"tokenizer_name": str(folder)},
            training={"mode": "pretrained"},
        ),
        VOCAB,
    ).eval()


def test_a_pretrained_model_keeps_its_layers_and_one_pass_equals_it(make_settings, tmp_path):
    source, ids = tiny_model("standard").eval(), tokens(2, 24)
    source.save_pretrained(tmp_path)
    once, twice = (converted(tmp_path, make_settings, passes) for passes in (1, 2))
    assert torch.equal(logits(once, ids), logits(source, ids))
    assert twice.config.num_hidden_layers == 6 and len(twice.model.layers) == 4
    for name, value in source.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value), name
    assert not torch.allclose(logits(twice, ids), logits(source, ids), atol=1e-2)


@pytest.mark.parametrize("account", [forward_flops, training_flops])
def test_a_pass_costs_what_a_layer_does(account):
    """tiny has 6 layers; 4 of them three times are 14."""

    def flops(*overrides):
        values = {
            "data": {"dataset_configs": [{"name": "math", "path": "embedded"}]},
            "training": {"max_steps": 1},
        }
        settings = settings_from_dict(values, overrides=overrides)
        return account(model_config(settings.model, 2048), 256).total()

    looped = flops("model.type=looped", "model.looped.passes=3")
    assert looped == flops("model.type=standard", "model.dimensions.num_hidden_layers=14")


@pytest.mark.parametrize("size", [{"num_hidden_layers": 2}, {"num_hidden_layers": 1}])
def test_a_middle_without_layers_is_refused(size, make_settings, tmp_path):
    with pytest.raises(
        UserError, match=r"model\.looped\.prelude=1 and coda=1 leave none of \d layers to repeat"
    ):
        make_settings("looped", model={"dimensions": size})
    tiny_model("standard", **size).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="leave none"):
        converted(tmp_path, make_settings, 2)


def test_a_depth_that_the_passes_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of passes=2"):
        ARCHITECTURES["looped"].config_class(num_hidden_layers=5)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_generation_is_that_of_all_passes_written_out(options):
    model = tiny_model("looped", num_hidden_layers=6).eval()
    dense, _ = unrolled(model)
    either = [
        each.generate(tokens(2, 7), max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        for each in (model, dense)
    ]
    assert torch.equal(*either) and len(either[0][0].unique()) > 3


def test_what_cannot_keep_passes_apart_is_refused():
    with pytest.raises(ValueError, match="continuous batching"):
        tiny_model("looped").eval().generate_batch([[1, 2, 3]])


def test_a_saved_model_runs_with_another_number_of_passes(tmp_path):
    model = tiny_model("looped", num_hidden_layers=6).eval()
    model.save_pretrained(tmp_path)
    thrice = AutoModelForCausalLM.from_pretrained(tmp_path, passes=3).eval()
    assert thrice.config.num_hidden_layers == 8 and thrice.config.schedule == [0, 1, 2, 1, 2, 1, 2, 3]
    dense, _ = unrolled(thrice)
    assert torch.equal(logits(thrice, tokens(2, 9)), logits(dense, tokens(2, 9)))
    thrice.save_pretrained(tmp_path / "thrice")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "thrice").eval()
    assert torch.equal(logits(again, tokens(2, 9)), logits(thrice, tokens(2, 9)))


def test_a_training_forward_is_one_graph():
    model, ids = tiny_model("looped", num_hidden_layers=6), tokens(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.equal(compiled(input_ids=ids, labels=ids, use_cache=False).loss, expected)


@pytest.mark.parametrize("options", [{"passes": 0}, {"prelude": -1}, {"coda": -1}])
def test_a_configuration_without_sense_is_refused(options):
    with pytest.raises(ValueError, match="too few"):
        ARCHITECTURES["looped"].config_class(**options)


def test_the_study_of_the_documentation_is_one(tmp_path):
    text = (PROJECT_ROOT / "docs/architectures.md").read_text()
    (tmp_path / "looped.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    runs = study_runs(compose_settings("looped", config_dir=tmp_path))
    assert {run.variant for run in runs} == {"standard", "deeper", "deepest", "looped"} and len(runs) == 12
    assert all(run.settings.training.max_tokens == 2e6 for run in runs)
