"""Settings that are each in their range and yet cannot be meant together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_transformers.constraints import first_violation
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import (
    CONTROLS,
    CONVERSATIONS,
    EMBEDDED,
    OPERATORS,
    DataSettings,
    ModelSettings,
    Settings,
    SourceSettings,
    UserError,
    holds_credentials,
)

BUDGETS = ("max_steps", "max_tokens", "max_flops")


def check(settings: Settings) -> None:
    """Refuse values out of range and impossible combinations.

    Raises:
        UserError: names the key, the value and what would be right.
    """
    if violation := first_violation(settings):
        raise UserError(violation)
    check_routing(settings.model)
    check_start(settings)
    check_budget(settings)
    check_data(settings.data)
    if settings.training.mode == "scratch":
        check_dimensions(settings)
    if not settings.evaluation.tasks:
        raise UserError(
            "evaluation.tasks is empty: name at least one suite or lm-eval task, such as quick_test"
        )
    check_tracking(settings.tracking.mlflow_uri)


def check_routing(model: ModelSettings) -> None:
    """Refuse a selection rule without what it selects by, and losses that nothing can learn."""
    rule = model.selection_rule or ""
    predicts = model.predictor_weight or (model.architecture.predicts and rule == "predictor")
    if "predictor" in rule and not predicts:
        raise UserError(f"model.selection_rule={rule} needs model.predictor_weight > 0, usually 0.01")
    for other in ARCHITECTURES.values():
        if rule in other.own_rules and rule not in model.architecture.own_rules:
            raise UserError(f"model.selection_rule={rule} needs model.type={other.name}")
    if rule in CONTROLS:
        check_control(model)
    if model.training_rule == "threshold":
        check_training_rule(model)
    try:
        model.architecture.check(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_control(model: ModelSettings) -> None:
    """Refuse what would learn or select beside a control."""
    control = f"model.selection_rule={model.selection_rule}"
    learned = {"predictor_weight": model.predictor_weight} | model.architecture.learned_weights(model)
    for name, weight in learned.items():
        if weight:
            raise UserError(f"{control} needs model.{name}=0: what a control selects cannot be learnt")
    if model.training_rule != "topk":
        raise UserError(f"{control} selects in training, too: leave model.training_rule at topk")


def check_training_rule(model: ModelSettings) -> None:
    """Refuse training by a threshold where evaluation has none."""
    if (rule := model.selection_rule) not in (None, "threshold"):
        raise UserError(f"model.training_rule=threshold needs model.selection_rule=threshold, not {rule}")


def check_start(settings: Settings) -> None:
    """Refuse a start from pretrained weights without what it needs, or with dimensions of our own."""
    model, training = settings.model, settings.training
    if training.mode == "scratch":
        if model.pretrained:
            raise UserError(f"model.pretrained={model.pretrained} needs training.mode=pretrained")
        return
    if not model.pretrained:
        raise UserError(
            "training.mode=pretrained needs model.pretrained: a folder or hub name of a Qwen2 model"
        )
    if settings.data.tokenizer_name is None:
        raise UserError(
            "training.mode=pretrained needs data.tokenizer_name, usually that of model.pretrained"
        )
    given = [("dimensions." + key, value) for key, value in vars(model.dimensions).items()]
    for key, value in (("size", model.size), *given):
        if value is not None:
            raise UserError(
                f"model.{key}={value}: the size is that of model.pretrained; set model.{key}=null"
            )


def check_budget(settings: Settings) -> None:
    """Refuse no budget, or more than one."""
    given = [f"training.{name}" for name in BUDGETS if getattr(settings.training, name) is not None]
    if len(given) != 1:
        raise UserError(
            "give exactly one of training.max_steps, max_tokens, max_flops and set the others to null; "
            f"given: {' and '.join(given) or 'none'}"
        )


def check_data(data: DataSettings) -> None:
    """Refuse no source, sources that cannot be told apart, and splits that leave nothing to train on."""
    if not data.dataset_configs:
        raise UserError("data.dataset_configs is empty: name at least one source")
    names = [source.name for source in data.dataset_configs]
    if len(set(names)) != len(names):
        raise UserError(f"data.dataset_configs: names must differ, got {', '.join(names)}")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"data.dataset_configs: the name {name!r} becomes part of file names; "
                "use only letters, digits and _ . -"
            )
    for source in data.dataset_configs:
        check_source(source)
        if source.path == "datatrove" and data.tokenizer_name is None:
            raise UserError(
                f"data.dataset_configs.{source.name}: has tokens: name the tokenizer that made them in "
                "data.tokenizer_name; the first line of the .metadata files says which"
            )
    without = [source.name for source in data.dataset_configs if source.validation_split is None]
    if without and not data.validation_split_percentage:
        raise UserError(
            f"data.validation_split_percentage=0: source {without[0]} names no validation_split of its own"
        )
    if data.validation_split_percentage + data.test_split_percentage >= 100:
        raise UserError("data.validation_split_percentage + data.test_split_percentage must be below 100")


def check_source(source: SourceSettings) -> None:
    """Refuse what a source of its kind has not, and a filter or columns that say nothing."""
    place = f"data.dataset_configs.{source.name}"
    for key, value in (("path", source.path), ("data_files", source.data_files)):
        check_addresses(f"{place}.{key}", value)
    read_by_columns = source.path not in (EMBEDDED, "datatrove")
    finetune = source.type == "finetune"
    refused = {
        "config": source.config and not read_by_columns,
        "revision": source.revision and not read_by_columns,
        "data_files": source.data_files and source.path == EMBEDDED,
        "validation_split": source.validation_split and source.path == EMBEDDED,
        "filter": source.filter and not read_by_columns,
        "text_column": source.text_column != "text" and (finetune or not read_by_columns),
        "columns": source.columns and not finetune,
    }
    for key, given in refused.items():
        if given:
            kind = f"type={source.type}" if read_by_columns else f"path={source.path}"
            hint = "; it has columns" if key == "text_column" and finetune and read_by_columns else ""
            raise UserError(
                f"{place}.{key}={getattr(source, key)}: a source of {kind} has none: leave it out{hint}"
            )
    if finetune and not read_by_columns:
        raise UserError(f"{place}.type=finetune: path={source.path} has no conversations, only texts")
    if source.columns:
        check_roles(place, source.columns)
    for number, condition in enumerate(source.filter):
        check_condition(f"{place}.filter[{number}]", condition)


def check_addresses(place: str, value: Any) -> None:
    """Refuse URLs that hold a password, token or signature, in whatever `data_files` is made of."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            check_addresses(place, entry)
        return
    try:
        secret = "://" in str(value) and holds_credentials(str(value))
    except ValueError:  # whose words may repeat a password
        raise UserError(f"{place}: holds an address that is no URL") from None
    if secret:
        raise UserError(
            f"{place}: a URL holds a user, password, token or signature, and manifests hold the settings; "
            "download the file first, or give s3://… or gs://…, whose clients take them from the environment"
        )


def check_roles(place: str, columns: Mapping[str, str]) -> None:
    """Refuse columns of which no conversation can be made."""
    fits = any(
        set(needed) <= set(columns) <= {*needed, *optional} for needed, optional in CONVERSATIONS.items()
    )
    if not fits:
        known = " | ".join(
            ", ".join([*needed, *(f"[{role}]" for role in optional)])
            for needed, optional in CONVERSATIONS.items()
        )
        raise UserError(f"{place}.columns: has {', '.join(columns)}; give the column of each of {known}")


def check_condition(place: str, condition: Sequence[Any]) -> None:
    """Refuse what is not [column, operator, value]."""
    if len(condition) != 3 or not isinstance(condition[0], str):
        raise UserError(f"{place}={condition}: must be [column, operator, value]")
    _, operator, value = condition
    if operator not in OPERATORS:
        raise UserError(f"{place}={condition}: no operator {operator!r}; there are {', '.join(OPERATORS)}")
    if isinstance(value, list) != (operator in ("in", "not in")) or value is None:
        kind = "a list of values" if operator in ("in", "not in") else "one value"
        raise UserError(f"{place}={condition}: {operator!r} needs {kind}")


def check_dimensions(settings: Settings) -> None:
    """Refuse dimensions of which no Qwen2 can be made, or no layer would be routed."""
    backbone = settings.model.backbone
    heads = backbone.num_attention_heads
    if settings.data.block_size > backbone.max_position_embeddings:
        raise UserError(
            f"data.block_size={settings.data.block_size}: must not exceed the model's "
            f"max_position_embeddings, {backbone.max_position_embeddings}"
        )
    for number, divisor in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if getattr(backbone, number) % getattr(backbone, divisor):
            raise UserError(
                f"model.dimensions: {number}={getattr(backbone, number)} is no multiple of "
                f"{divisor}={getattr(backbone, divisor)}"
            )
    if backbone.hidden_size // heads % 2:
        raise UserError(
            f"model.dimensions: hidden_size / num_attention_heads = {backbone.hidden_size // heads} must be "
            "even (rotary embeddings)"
        )
    least = settings.model.architecture.least_layers
    if backbone.num_hidden_layers < least:
        raise UserError(
            f"model.dimensions.num_hidden_layers={backbone.num_hidden_layers}: "
            f"model.type={settings.model.type} needs at least {least}"
        )


def check_tracking(mlflow_uri: str | None) -> None:
    """Refuse a server's address that holds a password: manifests hold the settings."""
    try:
        secret = holds_credentials(mlflow_uri or "")
    except ValueError as error:
        raise UserError(f"tracking.mlflow_uri: {error}") from error
    if secret:
        raise UserError(
            "tracking.mlflow_uri holds a user, password or token, and manifests hold the settings; give them "
            "in MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
