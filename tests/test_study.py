"""Variants × grid → runs, and what cannot be meant."""

import re

import pytest

from dynamic_transformers.configure import compose_settings, settings_from_json
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from dynamic_transformers.study import common, run_from_json, single_run, study_runs


def runs_of(*overrides, name="quickstart"):
    return study_runs(compose_settings(name, overrides))


def variants(text):
    return f"study.variants={{{text}}}"


def test_without_variants_each_architecture_is_one():
    runs = runs_of(name="default")
    assert [run.name for run in runs] == [f"{name}-seed0" for name in ARCHITECTURES]
    assert [run.settings.model.type for run in runs] == list(ARCHITECTURES)


def test_each_variant_is_run_at_each_point_of_the_grid_seed_by_seed():
    runs = runs_of(
        "study.variants={few: [model.type=mod, model.capacity=0.1], standard: [model.type=standard]}",
        "study.grid={model.size: [micro, tiny], run: {seed: [3, 4]}}",
        "study.variants.shallow=null",
        "study.variants.mod=null",
        "study.variants.sdt=null",
        "study.variants.stt=null",
    )
    names = [
        f"{label}-size-{size}-seed{seed}"
        for seed in (3, 4)
        for size in ("micro", "tiny")
        for label in ("standard", "few")
    ]
    assert [run.name for run in runs] == names
    few = runs[1]
    assert (few.settings.model.type, few.settings.model.capacity, few.settings.model.size) == (
        "mod",
        0.1,
        "micro",
    )
    assert few.settings.run.name == "quickstart-few-size-micro-seed3"
    assert few.point == {"model.size": "micro", "run.seed": 3} and few.settings.study.variant == "few"
    assert few.settings.study.overrides == ["model.type=mod", "model.capacity=0.1"]


def test_settings_that_travelled_as_json_give_the_same_runs():
    settings = compose_settings("quickstart", ["study.grid.run.seed=[0,1]"])
    assert study_runs(settings_from_json(settings.to_json())) == study_runs(settings)


def test_a_step_is_told_its_run_and_nothing_of_the_others():
    settings = compose_settings(
        "quickstart", ["study.grid.run.seed=[0,1]", variants("like stt: [model.match=stt]")]
    )
    shared = settings_from_json(common(settings).to_json())
    assert "shallow" not in shared.to_json()
    for run in study_runs(settings):
        assert run_from_json(shared, run.to_json()) == run
    more = compose_settings("quickstart", ["study.grid.run.seed=[0,1,2]"])
    assert common(more) == shared  # what has finished is found again when a study grows


def test_the_study_of_the_readme_is_one(tmp_path):
    readme = (PROJECT_ROOT / "README.md").read_text()
    (study,) = re.findall(r"```yaml\n(defaults: .*?study:\n.*?)```", readme, re.DOTALL)
    (tmp_path / "my_study.yaml").write_text(study)
    runs = study_runs(compose_settings("my_study", config_dir=tmp_path))
    assert len(runs) == 5 * 3 * 2 and {"tight mod", "like tight mod"} < {run.variant for run in runs}


def test_labels_are_free_text_and_become_names_of_files():
    (run, *_) = runs_of('study.variants={"MoD, γ = ⅛ (ours)": [model.type=mod, model.capacity=0.2]}')[-1:]
    assert run.variant == "MoD, γ = ⅛ (ours)" and run.name == "MoD-ours-seed0"


def test_train_py_is_one_point_of_the_study():
    settings = single_run(compose_settings("quickstart", ["study.variant=shallow", "run.seed=7"]))
    assert settings.run.name == "quickstart-shallow-seed7"
    assert settings.model.backbone.num_hidden_layers == 3
    plain = compose_settings("quickstart", ["model.type=sdt"])
    assert single_run(plain) == plain
    with pytest.raises(UserError, match=r"study\.variant=other: must be one of standard, shallow"):
        single_run(compose_settings("quickstart", ["study.variant=other"]))


@pytest.mark.parametrize("lr", ["1e-3", "0.002"])
def test_one_run_stands_on_the_grid(lr):
    study = ["study.variant=mod", 'study.grid={training.optimizer.lr: [1e-3, "2e-3"], run.seed: [0, 1]}']
    run = single_run(compose_settings("quickstart", [*study, "run.seed=1", f"training.optimizer.lr={lr}"]))
    assert run.training.optimizer.lr == float(lr)
    for missed in ([], ["run.seed=1"], ["run.seed=2", "training.optimizer.lr=1e-3"]):
        with pytest.raises(UserError, match=r"is not in study\.grid; give one of \["):
            single_run(compose_settings("quickstart", [*study, *missed]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (variants("a/b: [model.type=mod]"), "'a/b' cannot be a label"),
        (variants('"a$b": [model.type=mod]'), "cannot be a label"),
        (variants('"—": [model.type=mod]'), "cannot be a label"),
        (variants(f"{'a' * 61}: [model.type=mod]"), "cannot be a label: up to 60"),
        (variants('"": [model.type=mod]'), "cannot be a label"),
        (variants("twin: [model.type=mod]"), "mod {} and twin {} have the same settings"),
        (variants("twin: [model.type=mod, model.capacity=null]"), "have the same settings"),
        (
            variants(
                "twin: [model.dimensions.num_hidden_layers=3]"
            ),  # the same size, asked for in other words
            "shallow {} and twin {} have the same settings",
        ),
        (variants("twin: [model.type=mod, model.size=tiny]"), "mod {} and twin {} have the same settings"),
        (variants("twin: [model.type=standard, model.match=mod]"), "have the same settings"),
        (
            variants('"a b": [model.capacity=0.3], a-b: [model.capacity=0.4]'),
            "a b {} and a-b {} have the same name",
        ),
        (
            variants("x: [model.typ=mod]"),
            "study.variants.x: model.typ: no such key; did you mean model.type?",
        ),
        (variants("x: [model.type]"), "'model.type' is not of the form key=value"),
        (variants("x: [model.capacity=2]"), "study.variants.x: model.capacity=2.0: must be in (0, 1]"),
        (variants("x: [data.block_size=64]"), "study.variants.x: data.block_size is the same for all runs"),
        (variants("x: [run.name=me]"), "run.name is the same for all runs"),
        (variants("x: [evaluation.limit=3]"), "evaluation.limit is the same for all runs"),
        (variants("x: [study.baseline=mod]"), "study.baseline is the same for all runs"),
        (variants("x: model.type=mod"), "study.variants.x=model.type=mod: must be a list"),
        ("study.baseline=x", "study.baseline=x: must be one of standard, shallow, mod, sdt, stt, or null"),
        ("study.grid={model.type: [mod, sdt]}", "model.type is in study.grid, too"),
        ("study.grid={run.seed: []}", "study.grid.run.seed=[]: must be a list of at least one value"),
        ("study.grid={run.seed: 3}", "study.grid.run.seed=3: must be a list"),
        ("study.grid={run.seed: [0, 0]}", "have the same settings"),
        ("study.grid={run.seed: [-1]}", "run.seed=-1: must be in"),
        ("study.grid={data.block_size: [64]}", "study.grid: data.block_size is the same for all runs"),
        ("study.grid={model.colour: [red]}", "model.colour: no such key"),
    ],
)
def test_what_cannot_be_meant_is_one_line(override, words):
    with pytest.raises(UserError) as refusal:
        runs_of(override)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_study_without_a_baseline():
    runs = runs_of("study.baseline=null", "study.variants.standard=null")
    assert runs[0].variant == "shallow"
    left_out = runs_of("study.variants.standard=null")  # a baseline of the study, though it is not run
    assert [run.name for run in left_out] == [run.name for run in runs]


def layers(*overrides):
    return {run.variant: run.settings.model.backbone.num_hidden_layers for run in runs_of(*overrides)}


def test_dense_models_of_other_depth_and_width():
    (run,) = [
        run
        for run in runs_of(variants("wide: [model.type=standard, model.size=small, model.width_factor=1.5]"))
        if run.variant == "wide"
    ]
    backbone = run.settings.model.backbone
    assert (backbone.hidden_size, backbone.num_attention_heads, backbone.intermediate_size) == (384, 6, 1032)
    assert backbone.num_key_value_heads == 2 and backbone.num_hidden_layers == 8
    assert layers()["shallow"] == 3


def test_match_finds_the_depth_of_equal_cost():
    from dynamic_transformers.training.build import model_config
    from dynamic_transformers.training.flops import forward_flops

    text = "like {0}: [model.type=standard, model.match={0}]"
    matched = variants(", ".join(map(text.format, ("mod", "stt"))))
    # Without the shallow model, which has as many layers as `like mod`.
    runs = {run.variant: run.settings for run in runs_of(matched, "study.variants.shallow=null")}

    def cost(settings):
        return forward_flops(model_config(settings.model, 2048), settings.data.block_size).total()

    for routed in ("mod", "stt"):
        found = runs[f"like {routed}"].model.backbone.num_hidden_layers
        costs = {}
        for depth in range(1, 7):
            runs["standard"].model.dimensions.num_hidden_layers = depth
            costs[depth] = abs(cost(runs["standard"]) - cost(runs[routed]))
        assert found == min(costs, key=lambda depth: costs[depth]), routed
    assert runs["like mod"].model.backbone.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("model.match=none", "model.match=none: no such variant"),
        ("model.match=x", "model.match=x: that variant is matched itself"),
        ("model.match=mod, model.type=sdt", "needs model.type=standard and training.mode=scratch"),
    ],
)
def test_what_cannot_be_matched_is_one_line(overrides, words):
    with pytest.raises(UserError, match=r"study\.variants\.x: ") as refusal:
        runs_of(variants(f"x: [{overrides}]"))
    assert words in str(refusal.value)
