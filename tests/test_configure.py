"""Hydra files and overrides → settings; mistakes in one line."""

from pathlib import Path

import pytest

from dynamic_transformers.checks import check
from dynamic_transformers.configure import compose_settings, settings_from_dict, settings_from_json
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import CONTROLS, SELECTION_RULES, UserError
from dynamic_transformers.training.build import model_config

DEFAULT = compose_settings().to_dict()


@pytest.mark.parametrize("name", ["default", "laptop", "paper", "quickstart"])
def test_shipped_configurations_compose(name):
    settings = compose_settings(name)
    assert settings_from_json(settings.to_json()) == settings
    for architecture in ARCHITECTURES:
        assert (
            settings_from_json(settings.to_json(), [f"model.type={architecture}"]).model.type == architecture
        )


def test_run_name_follows_the_architecture():
    assert compose_settings("default", ["model.type=stt"]).run.name == "stt"


def test_an_experiment_is_a_difference_to_the_default(tmp_path):
    (tmp_path / "default.yaml").write_text("defaults: [settings_schema]\ntraining: {max_steps: 5}\n")
    text = "defaults: [default]\nmodel: {type: sdt, capacity: 0.25}\n"
    (tmp_path / "my_experiment.yaml").write_text(text)
    with pytest.raises(UserError, match="dataset_configs"):
        compose_settings("my_experiment", config_dir=tmp_path)
    source = "data.dataset_configs=[{name: math, path: embedded}]"
    settings = compose_settings("my_experiment", [source], config_dir=tmp_path)
    assert (settings.model.type, settings.model.capacity, settings.training.max_steps) == ("sdt", 0.25, 5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("foo=1", "foo: no such key; there are run, model"),
        ("model.tpye=mod", "did you mean model.type?"),
        ("batch_size=4", "did you mean data.batch_size or evaluation.batch_size?"),
        ("model.size.x=3", "model.size is a single value"),
        ("model=mod", "model=mod: must be a mapping"),
        ("run=foo", "run=foo: must be a mapping"),
        ("training.max_steps=abc", "training.max_steps=abc: must be a whole number"),
        ("training.max_steps=5.5", "training.max_steps=5.5: must be a whole number"),
        ("training.max_steps=1_0", "training.max_steps=1_0: must be a whole number"),
        ("run.seed=٣", "run.seed=٣: must be a whole number"),
        ("training.max_flops=1_0e3", "training.max_flops=1_0e3: must be a number"),
        ("training.optimizer.betas=[0.9,٣]", "training.optimizer.betas[1]=٣: must be a number"),
        ("training.max_steps=[1]", "training.max_steps=[1]: must be a whole number"),
        ("training.optimizer.lr=fast", "training.optimizer.lr=fast: must be a number"),
        ("training.optimizer.betas=[0.9]", "betas=[0.9]: must be a list of 2"),
        ("training.optimizer.betas=[0.9,0.95,0.99]", "must be a list of 2"),
        ("evaluation.confirm_run_unsafe_code=maybe", "must be true or false"),
        ("evaluation.tasks=a,b", "evaluation.tasks=a,b: must be a list, [a,b]"),
        ("data.dataset_configs=5", "data.dataset_configs=5: must be a list"),
        ("data.dataset_configs=[5]", "data.dataset_configs[0]=5: must be a mapping"),
        (
            "data.dataset_configs=[{name: x, tpye: hub}]",
            "[0].tpye: no such key; did you mean data.dataset_configs[0].type?",
        ),
        (
            "data.dataset_configs=[{name: x, shuffle: 1}]",
            "[0].shuffle: no such key; there are name",
        ),
        ("data.dataset_configs=[{name:x}]", "YAML wants a space behind a colon"),
        ("data.dataset_configs=[{name: x, data_files: *.jsonl}]", "is written in quotes"),
        ("data.dataset_configs=[{name: x", "data.dataset_configs=[{name: x: expected"),
        ("data.dataset_configs[7].weight=1", "data.dataset_configs[7]"),
        ("model.type=mod,sdt", "must be one of standard, mod, sdt, stt"),
        ("hydra.run.dir=x", "hydra: no such key"),
        ("~model.type=mod", "cannot be removed"),
        ("run.name=null", "run.name: must not be null"),
        ("run.name=${modle.type}", "run.name: Interpolation key 'modle.type' not found"),
        ("run.name=${", "run.name: "),
        ("tracking.mlflow_uri=https://token@host", "MLFLOW_TRACKING_TOKEN"),
        ("tracking.mlflow_uri=https://user:sesame@host", "MLFLOW_TRACKING_USERNAME"),
        ("nonsense", "not of the form key=value"),
        ("=5", "not of the form key=value"),
        (".=5", "not of the form key=value"),
        ("model.dimensions=null", "model.dimensions: must not be null"),
        ("data.dataset_configs[7]={name: a}", "data.dataset_configs[7]: no such entry"),
        ("training.optimizer.betas[2]=0.5", "training.optimizer.betas[2]: no such entry"),
        ("run.output_dir=~nobody-of-this-name/x", "~nobody-of-this-name"),
    ],
)
def test_mistakes_are_told_in_one_line(override, words):
    with pytest.raises(UserError) as error:
        settings_from_dict(DEFAULT, overrides=[override])
    assert words in str(error.value) and "\n" not in str(error.value)


TEXTS = ["2026_11_25", "true", "no", "1e3", "ü", "a b", "exp[1]", "a=b", "50%", "{a}", "a,b", "(x)", "#1"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is_written(text):
    for form in ("{}={}", "{}='{}'", '+{}="{}"'):
        overrides = [
            form.format(key, text) for key in ("run.name", "data.tokenizer_name", "tracking.experiment")
        ]
        settings = settings_from_dict(DEFAULT, overrides=overrides)
        assert settings.run.name == settings.data.tokenizer_name == settings.tracking.experiment == text


def test_the_command_line_hands_overrides_on_as_they_are_written():
    """Hydra's own grammar would refuse some of these and change others."""
    overrides = [
        f"tracking.experiment={''.join(TEXTS)}",
        "run.name=2026_11_25",
        "model.dimensions.hidden_size=64",
    ]
    settings = compose_settings("default", [*overrides, "data=hub", "run.output_dir=~/out"])
    assert settings == settings_from_dict(
        compose_settings("default", ["data=hub"]).to_dict(), overrides=[*overrides, "run.output_dir=~/out"]
    )
    assert settings.tracking.experiment == "".join(TEXTS) and settings.run.name == "2026_11_25"
    assert settings.data.dataset_configs[0].path == "HuggingFaceFW/fineweb-edu"
    with pytest.raises(UserError, match=r"^data=nope: no data/nope.yaml; there are: embedded, hub$"):
        compose_settings("default", ["data=nope"])


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("run.name='null'", lambda s: s.run.name, "null"),
        ("data.tokenizer_name=null", lambda s: s.data.tokenizer_name, None),
        ("run.name=${model.type}-x", lambda s: s.run.name, "standard-x"),
        ("run.output_dir=~/out", lambda s: s.run.output_dir, str(Path("~/out").expanduser())),
        ("training.resume=~/run/x", lambda s: s.training.resume, str(Path("~/run/x").expanduser())),
        (
            "data.dataset_configs=[{name: a, path: json, data_files: [~/a.jsonl, 'b/*.jsonl']}]",
            lambda s: s.data.dataset_configs[0].data_files,
            [str(Path("~/a.jsonl").expanduser()), "b/*.jsonl"],
        ),
        ("data.dataset_configs=[{name: a, config: no}]", lambda s: s.data.dataset_configs[0].config, "no"),
        ("data.dataset_configs.1.weight=0.7", lambda s: s.data.dataset_configs[1].weight, 0.7),
        ("data.dataset_configs[1].weight=0.7", lambda s: s.data.dataset_configs[1].weight, 0.7),
        ("evaluation.tasks=[quick_test,no]", lambda s: s.evaluation.tasks, ["quick_test", "no"]),
        ("evaluation.confirm_run_unsafe_code=yes", lambda s: s.evaluation.confirm_run_unsafe_code, True),
        ("training.max_steps=1e3", lambda s: s.training.max_steps, 1000),
        ("training.optimizer.betas=[0.9,0.5]", lambda s: s.training.optimizer.betas, (0.9, 0.5)),
        ("training.eval_every=${training.log_every}", lambda s: s.training.eval_every, 10),
        *(
            (f"{plus}model.dimensions{value}", lambda s: s.model.backbone.hidden_size, 64)
            for plus in ("", "+", "++")
            for value in (".hidden_size=64", "={hidden_size: 64}")
        ),
    ],
)
def test_overrides_are_taken_as_they_are_meant(override, get, value):
    assert get(settings_from_dict(DEFAULT, overrides=[override])) == value


FILES = {
    "tab": (b"run:\n\tname: x\n", "tab.yaml:3: a tab; YAML indents by spaces"),
    "twice": (b"run: {name: a}\nrun: {name: b}\n", "twice.yaml:3: run stands twice"),
    "deep_twice": (b"run:\n  name: a\n  name: b\n", "deep_twice.yaml:4: name stands twice"),
    "unclosed": (b"run: {name: x\n", "unclosed.yaml:3: expected"),
    "latin": ("# \nrun: {name: größe}\n".encode("latin-1"), "latin.yaml:3: not UTF-8"),
    "utf16": ("run: {name: a}\n".encode("utf-16"), "utf16.yaml:2: not UTF-8"),
    "typo": (
        b"training:\n  log_evry: 5\n",
        "typo.yaml:3: training.log_evry: no such key; did you mean training.log_every?",
    ),
    "group": (b"\ntraning:\n  log_every: 5\n", "group.yaml:3: traning: no such key; did you mean training?"),
    "item": (
        b"data:\n  dataset_configs:\n    - name: a\n      data_fils: x\n",
        "item.yaml:5: data.dataset_configs[0].data_fils: no such key; did you mean",
    ),
    "number": (
        b"training:\n  max_steps: abc\n",
        "number.yaml:3: training.max_steps=abc: must be a whole number",
    ),
    "single": (b"training: 5\n", "single.yaml:2: training=5: must be a mapping"),
    "empty_value": (b"run:\n  name:\n", "empty_value.yaml:3: run.name: must not be null"),
    "alias": (b"run: &x {name: *x}\n", "alias.yaml: an alias stands within what it names"),
    "two": (b"---\nrun: {}\n", "two.yaml:2: but found another document"),
    "both": (
        b"data:\n  dataset_configs:\n    - path: a\n      dataset_name: b\n",
        "both.yaml:5: data.dataset_configs[0].dataset_name: is data.dataset_configs[0].path by another name",
    ),
    "hydra": (b"hydra: {run: {dir: x}}\n", "hydra.yaml:2: hydra: no such key"),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_a_file_name_file_line_and_key(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / f"{name}.yaml").write_bytes(b"defaults: [default]\n" + content)
    with pytest.raises(UserError) as error:
        compose_settings(name, config_dir=tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("defaults: [defualt]", "defualt"),
        ("defaults: [default, {override data: hbu}]", "data/hbu"),
        ("defaults: {default}", "must be a list"),
        ("defaults: [it]", "leads back to its own file"),
        ("- a", "it.yaml:1: must be a mapping"),
        (
            "defaults: [default]\nmodel: {dimensions: {initializer_range: 1e9}}",
            "initializer_range=1000000000.0: must be in",
        ),
    ],
)
def test_mistakes_in_a_file_end_in_one_line(content, words, tmp_path):
    (tmp_path / "it.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        compose_settings("it", config_dir=tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_key_may_have_its_other_name_in_a_file_too(tmp_path):
    entry = (
        "{type: finetune, dataset_name: team/web, dataset_config: small, columns: {messages: dataset_name}}"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(f"dataset_configs: [{entry}]")
    (tmp_path / "part.yaml").write_text("defaults: [default, override data: mine]")
    (tmp_path / "whole.yaml").write_text(f"defaults: [default]\ndata: {{dataset_configs: [{entry}]}}")
    for name in ("part", "whole"):
        (source,) = compose_settings(name, config_dir=tmp_path).data.dataset_configs
        assert (source.name, source.path, source.config) == ("web-small", "team/web", "small")
        assert source.columns == {"messages": "dataset_name"}


def test_a_file_is_read_as_it_is_written(tmp_path):
    text = """\
defaults: [default]
run: {name: 2026_11_25}
data:
  dataset_configs:
    - &a {name: größe, path: no, config: on, split: 1_0, data_files: 1e3, weight: 2}
    - {<<: *a, name: b}
training: {max_steps: null, max_flops: 2e12, optimizer: {lr: 1.0e-3, betas: [0.9, 0.99]}}
tracking: {mlflow: no}
"""
    (tmp_path / "it.yaml").write_bytes(text.replace("größe", "a").encode("utf-8-sig"))
    settings = compose_settings("it", config_dir=tmp_path)
    first, second = settings.data.dataset_configs
    assert (settings.run.name, settings.tracking.mlflow) == ("2026_11_25", False)
    assert (first.path, first.config, first.split, first.data_files) == ("no", "on", "1_0", "1e3")
    assert (second.name, second.weight, second.config) == ("b", 2.0, "on")
    assert (settings.training.max_flops, settings.training.optimizer.betas) == (2e12, (0.9, 0.99))


def test_a_folder_of_the_user_wins_and_extends_ours(tmp_path, monkeypatch):
    own = tmp_path / "config"
    (own / "data").mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [laptop, {override data: notes}]\nrun: {name: mine}\n")
    (own / "data" / "notes.yaml").write_text("dataset_configs: [{name: notes, path: json, data_files: n}]\n")
    (own / "quickstart.yaml").write_text("defaults: [default]\nrun: {name: ours}\n")
    monkeypatch.chdir(tmp_path)
    mine = compose_settings("mine", ["training.max_steps=7"])
    assert (mine.run.name, mine.model.size, mine.training.max_steps) == ("mine", "small", 7)
    assert [source.name for source in mine.data.dataset_configs] == ["notes"]
    assert compose_settings("quickstart").run.name == "ours"
    assert compose_settings("paper").run.name == "paper-standard"
    with pytest.raises(UserError, match="did you mean mine"):
        compose_settings("mime")
    with pytest.raises(UserError, match="no such folder"):
        compose_settings("mine", config_dir=tmp_path / "nothing")


@pytest.mark.parametrize("rule", SELECTION_RULES)
@pytest.mark.parametrize(
    ("architecture", "predictor_weight", "aux_weight"),
    [("mod", 0, 0), ("mod", 0.01, 0), ("mod", 0, 0.01), ("sdt", 0, 0.01), ("sdt", 0.01, 0), ("stt", 0, 0.01)],
)
def test_a_selection_rule_is_refused_where_the_model_would_refuse_it(
    architecture, predictor_weight, aux_weight, rule
):
    overrides = [f"model.type={architecture}", f"model.predictor_weight={predictor_weight}"]
    settings = settings_from_dict(DEFAULT, overrides=[*overrides, f"model.mod.aux_weight={aux_weight}"])
    settings.model.selection_rule = rule
    learns = predictor_weight or (architecture == "mod" and aux_weight)  # what a control selects cannot be
    if rule in model_config(settings.model, vocab_size=300).available_rules and not (
        rule in CONTROLS and learns
    ):
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


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [{"name": "prose", "path": "embedded", "data_files": "a"}],
            "data_files=a: a source of path=embedded has",
        ),
        ([{"name": "a", "path": "json", "data_files": 5}], "data_files=5: must be text"),
        ([{"name": "a", "path": "json", "data_files": {"train": [1]}}], "must be text"),
    ],
)
def test_a_source_that_is_not_what_it_says_is_refused(sources, message):
    with pytest.raises(UserError, match=message):
        settings_from_dict({"training": {"max_steps": 1}, "data": {"dataset_configs": sources}})


def test_a_template_that_nobody_filled_ends_in_one_line():
    with pytest.raises(UserError, match="a key is no text"):
        compose_settings("default", ["data.dataset_configs={{x}}"])
