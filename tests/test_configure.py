"""Hydra files and overrides → settings; mistakes in one line."""

import dataclasses

import pytest

from dynamic_transformers.configure import check, compose_settings, settings_from_dict, settings_from_json
from dynamic_transformers.settings import ARCHITECTURES, SELECTION_RULES, SIZES, Dimensions, UserError
from dynamic_transformers.training.build import model_config


@pytest.mark.parametrize("name", ["default", "laptop", "paper", "quickstart"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_configurations_compose(name, architecture):
    settings = compose_settings(name, [f"model.type={architecture}"])
    assert settings.model.type == architecture
    assert settings_from_json(settings.to_json()) == settings


def test_run_name_follows_the_architecture():
    assert compose_settings("default", ["model.type=stt"]).run.name == "stt"


def test_an_experiment_is_a_difference_to_the_default(tmp_path):
    (tmp_path / "default.yaml").write_text("defaults: [settings_schema]\ntraining: {max_steps: 5}\n")
    text = "defaults: [default]\nmodel: {type: sdt, capacity: 0.25}\n"
    (tmp_path / "my_experiment.yaml").write_text(text)
    with pytest.raises(UserError, match="dataset_configs"):
        compose_settings("my_experiment", config_dir=tmp_path)
    source = "data.dataset_configs=[{name: math, type: embedded}]"
    settings = compose_settings("my_experiment", [source], config_dir=tmp_path)
    assert (settings.model.type, settings.model.capacity, settings.training.max_steps) == ("sdt", 0.25, 5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("foo=1", "foo: no such key"),
        ("model.tpye=mod", "did you mean model.type?"),
        ("model.type=gpt", "model.type=gpt: must be one of standard, mod, sdt, stt"),
        ("model.size=huge", "model.size=huge: must be one of"),
        ("model.capacity=2", "must lie in"),
        ("training.max_steps=abc", "training.max_steps=abc: Value 'abc'"),
        ("training.max_tokens=5", "exactly one of"),
        ("training.max_steps=null", "given: none"),
        ("training.max_steps=0", "must be positive"),
        ("training.mode=pretrained", "needs model.pretrained"),
        ("model.selection_rule=predictor", "needs model.predictor_weight"),
        ("model.selection_rule=aux", "needs model.type=mod"),
        ("data.block_size=1", "data.block_size=1: must be at least 2"),
        ("data.block_size=100000", "max_position_embeddings"),
        ("data.dataset_configs=[{name: a/b}]", "becomes part of file names"),
        ("data.dataset_configs=[{name: a, weight: 0}]", "must be positive"),
        ("data=nope", "data/nope"),
        ("training.optimizer.lr=nan", "training.optimizer.lr=nan: must be finite"),
        ("training.optimizer.router_lr_multiplier=-inf", "router_lr_multiplier=-inf: must be finite"),
        ("data.dataset_configs=[{name: a, weight: nan}]", "must be positive and finite"),
        ("tracking.mlflow_uri=https://token@host", "MLFLOW_TRACKING_TOKEN"),
        ("tracking.mlflow_uri=https://user:sesame@host", "MLFLOW_TRACKING_USERNAME"),
        ("nonsense", "not of the form key=value"),
    ],
)
def test_mistakes_are_told_in_one_line(override, words):
    with pytest.raises(UserError) as error:
        compose_settings("default", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("budget", ["max_steps=-1", "max_tokens=nan", "max_flops=inf"])
def test_a_budget_is_positive_and_finite(budget):
    with pytest.raises(UserError, match=r"training.max_\w+=.*: must be (positive|finite)"):
        compose_settings("default", ["training.max_steps=null", f"training.{budget}"])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Dimensions)][:5])
@pytest.mark.parametrize("number", [0, -1])
def test_dimensions_are_at_least_one(name, number):
    values = compose_settings("default").to_dict()
    values["model"]["dimensions"] = dataclasses.asdict(SIZES["tiny"]) | {name: number}
    with pytest.raises(UserError, match=f"model.dimensions.{name}={number}: must be at least 1"):
        settings_from_dict(values)


@pytest.mark.parametrize("rule", SELECTION_RULES)
@pytest.mark.parametrize(
    ("architecture", "predictor_weight", "aux_weight"),
    [("mod", 0, 0), ("mod", 0.01, 0), ("mod", 0, 0.01), ("sdt", 0, 0.01), ("sdt", 0.01, 0), ("stt", 0, 0.01)],
)
def test_a_selection_rule_is_refused_where_the_model_would_refuse_it(
    architecture, predictor_weight, aux_weight, rule
):
    overrides = [f"model.type={architecture}", f"model.predictor_weight={predictor_weight}"]
    settings = compose_settings("default", [*overrides, f"model.mod.aux_weight={aux_weight}"])
    settings.model.selection_rule = rule
    if rule in model_config(settings.model, vocab_size=300).available_rules:
        check(settings)
    else:
        with pytest.raises(UserError, match=f"model.selection_rule={rule} needs"):
            check(settings)


def test_unknown_configuration_names_those_that_exist():
    with pytest.raises(UserError, match="laptop"):
        compose_settings("lptop")


def test_unknown_key_in_a_dictionary_is_refused():
    values = compose_settings("default").to_dict()
    values["model"]["capasity"] = 1
    with pytest.raises(UserError, match="capasity"):
        settings_from_dict(values)
