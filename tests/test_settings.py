"""Every setting has its range beside it, and values outside are refused with key, value and range."""

import copy
import dataclasses
import math
import typing

import pytest

from dynamic_transformers.checks import check
from dynamic_transformers.configure import compose_settings, settings_from_dict
from dynamic_transformers.constraints import In, OneOf, constraints_of, hints_of
from dynamic_transformers.models import configuration
from dynamic_transformers.reading import plain_type
from dynamic_transformers.settings import CONTROLS, Settings, UserError


def fields(settings, prefix=()):
    """Path, type and annotation of every field of a dataclass and of those within it."""
    for name, hint in hints_of(settings).items():
        base, path = plain_type(hint)[0], (*prefix, name)
        entry = typing.get_args(base)[0] if typing.get_origin(base) in (list, tuple) else base
        if dataclasses.is_dataclass(entry):
            yield from fields(entry, (*path, 0) if entry is not base else path)
        else:
            yield path, base, hint


DEFAULT = compose_settings().to_dict()
FIELDS = list(fields(Settings))
KINDS = {
    kind: [(path, base, hint) for path, base, hint in FIELDS if is_kind(base)]
    for kind, is_kind in {
        "number": lambda base: {int, float} & {base, *typing.get_args(base)},
        "text": lambda base: base is str,
        "other": lambda base: (
            base in (bool, typing.Any) or typing.get_args(base)[:1] in [(str,), (list[typing.Any],)]
        ),
    }.items()
}


def named(path):
    return ".".join(map(str, path))


def test_every_field_is_of_a_kind_that_is_tested():
    assert sorted(map(str, (path for kind in KINDS.values() for path, _, _ in kind))) == sorted(
        str(path) for path, _, _ in FIELDS
    )
    assert len(KINDS["number"]) > 50 and len(KINDS["text"]) > 20


def changed(path, value):
    """The default settings with one value."""
    values = copy.deepcopy(DEFAULT)
    if path[:2] == ("training", "max_tokens") or path[:2] == ("training", "max_flops"):
        values["training"]["max_steps"] = None
    place = values
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return values


def outside(interval):
    """Numbers just outside of an interval, and those that lie in none."""
    low, high = interval.bounds
    yield low if interval.interval[0] == "(" else low - 1
    if high < math.inf:
        yield high if interval.interval[-1] == ")" else high * 2 + 1
    yield from (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("path", "base", "hint"),
    KINDS["number"],
    ids=lambda value: named(value) if isinstance(value, tuple) else "",
)
def test_a_number_outside_its_range_is_refused(path, base, hint):
    (interval,) = [entry for entry in constraints_of(hint) if isinstance(entry, In)]
    entries = len(typing.get_args(base))
    key = named(path).replace(".0.", "[0].")
    for number in outside(interval):
        if int in (base, *typing.get_args(base)):
            if not math.isfinite(number):
                continue
            number = int(number)
        shown = f"{number}" if float not in (base, *typing.get_args(base)) else f"{float(number)}"
        value = [number] * entries if entries else number
        with pytest.raises(UserError) as error:
            settings_from_dict(changed(path, value))
        place = f"{key}[0]" if entries else key
        assert str(error.value) == f"{place}={shown}: {interval.refusal(number)}"
        assert str(interval.bounds[0]).removesuffix(".0") in str(error.value) or "e" in str(
            interval.bounds[0]
        )


@pytest.mark.parametrize(
    ("path", "base", "hint"),
    KINDS["text"],
    ids=lambda value: named(value) if isinstance(value, tuple) else "",
)
def test_a_text_is_one_of_its_words_and_never_empty(path, base, hint):
    key = named(path).replace(".0.", "[0].")
    with pytest.raises(UserError, match=r"is empty|with path=embedded a name too"):
        settings_from_dict(changed(path, ""))
    for choice in [entry for entry in constraints_of(hint) if isinstance(entry, OneOf)]:
        with pytest.raises(UserError) as error:
            settings_from_dict(changed(path, "nonsense"))
        assert str(error.value) == f"{key}=nonsense: must be one of {', '.join(choice.words)}"


@pytest.mark.parametrize(
    "name",
    ["../../escape", "a/b", ".", "..", ".hidden", "a\nb", " ", "data", "mlflow.db", "x" * 201, "ü" * 101],
)
def test_a_run_is_one_folder_below_its_output_folder(name):
    with pytest.raises(UserError, match=r"^run\.name"):
        settings_from_dict(changed(("run", "name"), name))


@pytest.mark.parametrize("name", ["ü", "exp[1]", "a b", "50%", "a::b", "2026_11_25", "x" * 200, "~"])
def test_a_run_may_be_called_what_a_folder_may(name):
    settings = settings_from_dict(changed(("run", "name"), name))
    assert settings.run_dir.name == name and settings.run_dir.parent.name == "outputs"


PRETRAINED = {
    "training": {"mode": "pretrained"},
    "model": {"pretrained": "p"},
    "data": {"tokenizer_name": "t"},
}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (PRETRAINED | {"model": {"pretrained": "p", "size": "1.5b"}}, "model.size=1.5b: the size is that of"),
        (
            PRETRAINED | {"model": {"pretrained": "p", "dimensions": {"hidden_size": 64}}},
            "dimensions.hidden_size=64",
        ),
        (PRETRAINED | {"data": {}}, "needs data.tokenizer_name"),
        (PRETRAINED | {"model": {}}, "needs model.pretrained"),
        ({"model": {"pretrained": "p"}}, "needs training.mode=pretrained"),
        (
            {"model": {"type": "mod", "dimensions": {"num_hidden_layers": 1}}},
            "num_hidden_layers=1: model.type=mod",
        ),
        (
            {"model": {"dimensions": {"hidden_size": 65}}},
            "hidden_size=65 is no multiple of num_attention_heads=2",
        ),
        ({"model": {"dimensions": {"hidden_size": 6}}}, "= 3 must be even"),
        (
            {"model": {"dimensions": {"num_key_value_heads": 2, "num_attention_heads": 1}}},
            "num_key_value_heads=2",
        ),
        ({"model": {"dimensions": {"max_position_embeddings": 255}}}, "block_size=256: must not exceed"),
        (
            {"model": {"type": "mod", "selection_rule": "random", "mod": {"aux_weight": 0.01}}},
            "model.selection_rule=random needs model.mod.aux_weight=0: what a control selects",
        ),
        ({"model": {"selection_rule": "even", "predictor_weight": 0.1}}, "needs model.predictor_weight=0"),
        ({"model": {"selection_rule": "even", "training_rule": "threshold"}}, "leave model.training_rule"),
        (
            {"model": {"training_rule": "threshold", "selection_rule": "topk"}},
            "model.training_rule=threshold needs model.selection_rule=threshold, not topk",
        ),
        (
            {"model": {"type": "stt", "training_rule": "threshold", "stt": {"targets": "threshold"}}},
            "needs model.stt.targets=topk and model.stt.train_output=sparse",
        ),
        ({"model": {"type": "stt", "predictor_weight": 0.1}}, "STT's student is its predictor"),
        ({"data": {"validation_split_percentage": 60, "test_split_percentage": 40}}, "must be below 100"),
        ({"data": {"validation_split_percentage": 0}}, "source prose names no validation_split of its own"),
        ({"data": {"dataset_configs": []}}, "data.dataset_configs is empty"),
        ({"data": {"dataset_configs": [{"name": "a"}, {"name": "a"}]}}, "names must differ"),
        ({"data": {"dataset_configs": [{"name": "a/b"}]}}, "becomes part of file names"),
        ({"data": {"dataset_configs": [{"weight": 2}]}}, "data.dataset_configs[0]: give a path"),
        ({"evaluation": {"tasks": []}}, "evaluation.tasks is empty"),
        ({"training": {"max_tokens": 5}}, "exactly one of"),
        ({"training": {"max_steps": None}}, "given: none"),
    ],
)
def test_what_cannot_be_meant_together_is_refused(values, words):
    with pytest.raises(UserError) as error:
        settings_from_dict(DEFAULT, values)
    assert words in str(error.value)


SECRETS = [
    "https://person:hidden@example.org/a.jsonl",
    "https://hidden@example.org/a.jsonl",
    "sftp://person:hidden@example.org/a.jsonl",
    "s3://bucket/a.jsonl?X-Amz-Signature=hidden&X-Amz-Date=1",
    "https://example.org/a.jsonl?x=1&SIG=hidden",
    "https://example.org/a.jsonl?%74oken=hidden",
    "zip://a.jsonl::https://person:hidden@example.org/a.zip",
    "https://hidden[@example.org/a.jsonl",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_in_the_address_of_data_is_refused_and_not_repeated(url):
    for key, source in (
        ("data_files", {"path": "json", "data_files": url}),
        ("data_files", {"path": "embedded", "data_files": {"train": ["a.jsonl", url]}}),
        ("path", {"path": url}),
    ):
        with pytest.raises(UserError) as error:
            settings_from_dict(DEFAULT, {"data": {"dataset_configs": [{"name": "prose", **source}]}})
        told = str(error.value)
        assert told.startswith(f"data.dataset_configs.prose.{key}: ") and "hidden" not in told
        assert "\n" not in told


def test_an_address_without_a_secret_is_taken():
    for url in (
        "https://example.org/a.jsonl?version=2&monkey=1",
        "hf://datasets/someone/web@main/a.jsonl",
        "abfs://container@account.dfs.core.windows.net/*.jsonl",
        "s3://bucket/[ab]?.jsonl",
        "http://[::1]:80/a.jsonl",
        "notes/person:a@b?sig=1.jsonl",
    ):
        source = {"name": "a", "path": "json", "data_files": url}
        settings_from_dict(DEFAULT, {"data": {"dataset_configs": [source]}})


def test_dimensions_replace_those_of_the_size_one_by_one():
    settings = settings_from_dict(DEFAULT, {"model": {"size": "small"}})
    settings.model.dimensions.num_hidden_layers = 3
    check(settings)
    assert (settings.model.backbone.hidden_size, settings.model.backbone.num_hidden_layers) == (256, 3)
    assert settings_from_dict(settings.to_dict()) == settings


def test_settings_and_models_name_the_same_controls():
    assert CONTROLS == configuration.CONTROLS  # twice, since the models stand alone
