"""Hydra's configuration → checked `Settings`, and user errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynamic_transformers.settings import (
    ARCHITECTURES,
    ATTENTION,
    PROJECT_ROOT,
    SELECTION_RULES,
    SIZES,
    Settings,
    UserError,
    holds_credentials,
)

CONFIG_DIR = PROJECT_ROOT / "config"
LEAST = (
    ("run", "seed", 0),
    ("data", "block_size", 2),
    ("data", "batch_size", 1),
    ("data", "vocab_size", 257),
    ("data", "max_eval_tokens", 1),
    ("training", "gradient_accumulation_steps", 1),
    ("training", "log_every", 1),
    ("training", "eval_every", 0),
    ("training", "checkpoint_every", 0),
    ("training.optimizer", "weight_decay", 0),
    ("training.optimizer", "warmup_fraction", 0),
    ("training.optimizer", "min_lr_fraction", 0),
    ("model", "predictor_weight", 0),
    ("model.mod", "aux_weight", 0),
    ("model.mod", "z_loss_weight", 0),
    ("model", "capacity_warmup_steps", 0),
    ("model.surprise", "window", 1),
    ("model.surprise", "prior_loss_weight", 0),
    ("model.stt", "student_weight", 0),
    ("model.stt", "gate_mean_weight", 0),
    ("model.surprise", "beta_warmup_steps", 0),
    ("evaluation", "batch_size", 1),
    ("evaluation", "limit", 1),
    ("evaluation", "num_fewshot", 0),
    ("system", "num_workers", 0),
)
POSITIVE = (
    ("training.optimizer", "lr"),
    ("training.optimizer", "eps"),
    ("training.optimizer", "max_grad_norm"),
    ("model.surprise", "offset_ce_init"),
    ("model.surprise", "multiplier_cu_init"),
    ("model.surprise", "beta_start"),
    ("model.surprise", "beta_end"),
    ("model.surprise", "prior_factor"),
    ("data", "validation_split_percentage"),
    ("data", "test_split_percentage"),
)
DIMENSIONS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
)


def settings_from_dict(*values: dict[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Build and check `Settings`.

    Args:
        values: nested dictionaries, each over those before; missing keys take the dataclasses' defaults.
        overrides: `key=value` strings, as on the command line.

    Raises:
        UserError: unknown key, wrong type, or an impossible combination.
    """
    try:
        config = OmegaConf.merge(OmegaConf.structured(Settings), *values, *map(_parsed, overrides))
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_line(error)) from error
    assert isinstance(settings, Settings)
    check(settings)
    return settings


def settings_from_json(text: str, overrides: Sequence[str] = ()) -> Settings:
    """Inverse of `Settings.to_json`, with overrides."""
    return settings_from_dict(json.loads(text), overrides=overrides)


def settings_from_parameters(
    settings: str,
    overrides: Sequence[str],
    dataset_configs: str,
    max_flops: float,
    mlflow_uri: str,
    mlflow_experiment: str,
) -> Settings:
    """Settings of a pipeline's run, from the parameters that a person may have changed in KFP's form.

    Where no MLflow server is named, here or in MLFLOW_TRACKING_URI, tracking is off: a step's own disk is
    gone with it.

    Args:
        settings: all settings, as JSON; the other parameters go over it where they are given.
        overrides: `key=value` each.
        dataset_configs: JSON list of sources; '' leaves those of `settings`.
        max_flops: budget of each run in training FLOPs; 0 leaves that of `settings`.
        mlflow_uri, mlflow_experiment: '' leaves those of `settings`.

    Raises:
        UserError: as `settings_from_dict`, or not the JSON that is asked for.
    """
    values = _json("settings", settings, dict)
    changes: dict[str, Any] = {"data": {}, "training": {}, "tracking": {}}
    if dataset_configs:
        changes["data"]["dataset_configs"] = _json("dataset_configs", dataset_configs, list)
    if max_flops:
        changes["training"] = {"max_steps": None, "max_tokens": None, "max_flops": max_flops}
    if mlflow_uri:
        changes["tracking"]["mlflow_uri"] = mlflow_uri
    if mlflow_experiment:
        changes["tracking"]["experiment"] = mlflow_experiment
    result = settings_from_dict(values, changes, overrides=overrides)
    if not (result.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        result.tracking.mlflow = False
    return result


def run_names(architectures: Sequence[str], seeds: Sequence[int | float]) -> list[str]:
    """`architecture:seed` of every run of a pipeline; KFP's local runner makes floats of whole numbers.

    Raises:
        UserError: an unknown architecture, a seed that is no whole number, or one named twice.
    """
    for name in architectures:
        _one_of("architectures", name, ARCHITECTURES)
    for seed in seeds:
        if not isinstance(seed, int | float) or seed < 0 or not float(seed).is_integer():
            raise UserError(f"seeds: {seed} must be a whole number, at least 0")
    names = [f"{architecture}:{int(seed)}" for seed in seeds for architecture in architectures]
    if not names or len(set(names)) < len(names):
        raise UserError("architectures and seeds: name at least one of each, and each once")
    return names


def compose_settings(
    config_name: str = "default", overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR
) -> Settings:
    """Compose `config_dir/config_name.yaml` with Hydra and return checked `Settings`.

    Raises:
        UserError: no such file, bad override, unknown key, wrong type, impossible combination.
    """
    config_name = config_name.removesuffix(".yaml")
    if not (config_dir / f"{config_name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in config_dir.glob("*.yaml"))) or "none"
        raise UserError(f"no configuration {config_name!r} in {config_dir}; there are: {known}")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is not of the form key=value")
    GlobalHydra.instance().clear()
    # default.yaml begins with this schema, so that every key of the dataclasses can be overridden.
    ConfigStore.instance().store("settings_schema", Settings)
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            # `defaults: [default]` without `_self_` is how the README writes an experiment: the file wins.
            warnings.filterwarnings("ignore", message=".*missing `_self_`")
            composed = compose(config_name, overrides=list(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydra_line(error, overrides)) from error
    assert isinstance(values, dict)
    return settings_from_dict({str(key): value for key, value in values.items()})


def check(settings: Settings) -> None:
    """Refuse impossible combinations.

    Raises:
        UserError: names the key, the value and what would be right.
    """
    model, data, training = settings.model, settings.data, settings.training
    _one_of("model.type", model.type, ARCHITECTURES)
    _one_of("model.size", model.size, tuple(SIZES))
    _one_of("model.attention", model.attention, ATTENTION)
    _one_of("model.mod.gate", model.mod.gate, ("sigmoid", "raw"))
    _one_of("model.mod.routing", model.mod.routing, ("learned", "random"))
    _one_of("model.surprise.beta_schedule", model.surprise.beta_schedule, ("linear", "cosine"))
    _one_of("model.surprise.normalize", model.surprise.normalize, ("none", "moving_average", "state"))
    _one_of("model.stt.targets", model.stt.targets, ("topk", "threshold"))
    _one_of("model.stt.train_output", model.stt.train_output, ("sparse", "dense"))
    _one_of("training.mode", training.mode, ("scratch", "pretrained"))
    _one_of("system.precision", settings.system.precision, ("fp32", "bf16"))
    _one_of("system.device", settings.system.device, ("auto", "cpu", "cuda"))
    if model.capacity is not None and not 0 < model.capacity <= 1:
        raise UserError(f"model.capacity={model.capacity}: must lie in (0, 1]")
    if model.selection_rule is not None:
        _one_of("model.selection_rule", model.selection_rule, SELECTION_RULES)
        predicts = model.predictor_weight or (model.type == "stt" and model.selection_rule == "predictor")
        if "predictor" in model.selection_rule and not predicts:
            raise UserError(
                f"model.selection_rule={model.selection_rule} needs model.predictor_weight > 0, usually 0.01"
            )
        if model.selection_rule == "aux" and not (model.type == "mod" and model.mod.aux_weight):
            raise UserError("model.selection_rule=aux needs model.type=mod and model.mod.aux_weight > 0")
    if model.mod.routing == "random" and model.mod.aux_weight:
        raise UserError("model.mod.routing=random needs model.mod.aux_weight=0: noise cannot be learnt")
    if model.type == "stt" and model.predictor_weight:
        raise UserError("model.predictor_weight: STT's student is its predictor; leave it at 0")
    if training.mode == "pretrained" and not model.pretrained:
        raise UserError(
            "training.mode=pretrained needs model.pretrained: a folder or hub name of a Qwen2 model"
        )
    if training.mode == "pretrained" and data.tokenizer_name is None:
        raise UserError(
            "training.mode=pretrained needs data.tokenizer_name, usually that of model.pretrained"
        )
    if training.mode == "scratch" and model.pretrained:
        raise UserError(f"model.pretrained={model.pretrained} needs training.mode=pretrained")
    budgets = [
        name for name in ("max_steps", "max_tokens", "max_flops") if getattr(training, name) is not None
    ]
    if len(budgets) != 1:
        given = " and ".join(f"training.{name}" for name in budgets) or "none"
        raise UserError(
            "give exactly one of training.max_steps, max_tokens, max_flops and set the others to null; "
            f"given: {given}"
        )
    if (budget := getattr(training, budgets[0])) <= 0:
        raise UserError(f"training.{budgets[0]}={budget}: must be positive")
    if not data.dataset_configs:
        raise UserError("data.dataset_configs is empty: name at least one source")
    names = [source.name for source in data.dataset_configs]
    if len(set(names)) != len(names):
        raise UserError(f"data.dataset_configs: names must differ, got {', '.join(names)}")
    for source in data.dataset_configs:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", source.name):
            raise UserError(
                f"data.dataset_configs: the name {source.name!r} becomes part of file names; "
                "use only letters, digits and _ . -"
            )
        _one_of(f"data.dataset_configs.{source.name}.type", source.type, ("embedded", "hub"))
        if not 0 < source.weight < math.inf:
            raise UserError(
                f"data.dataset_configs.{source.name}.weight={source.weight}: must be positive and finite"
            )
    check_ranges(settings)
    backbone = model.backbone
    if data.block_size > backbone.max_position_embeddings:
        raise UserError(
            f"data.block_size={data.block_size}: must not exceed the model's max_position_embeddings, "
            f"{backbone.max_position_embeddings}"
        )
    if backbone.hidden_size % backbone.num_attention_heads:
        raise UserError(
            f"model.dimensions: hidden_size={backbone.hidden_size} is no multiple of "
            f"num_attention_heads={backbone.num_attention_heads}"
        )
    if backbone.num_attention_heads % backbone.num_key_value_heads:
        raise UserError(
            f"model.dimensions: num_attention_heads={backbone.num_attention_heads} is no multiple of "
            f"num_key_value_heads={backbone.num_key_value_heads}"
        )
    if backbone.hidden_size // backbone.num_attention_heads % 2:
        raise UserError(
            "model.dimensions: hidden_size / num_attention_heads must be even (rotary embeddings)"
        )
    if data.validation_split_percentage + data.test_split_percentage >= 100:
        raise UserError("data.validation_split_percentage + data.test_split_percentage must be below 100")
    try:
        secret = holds_credentials(settings.tracking.mlflow_uri or "")
    except ValueError as error:
        raise UserError(f"tracking.mlflow_uri: {error}") from error
    if secret:
        raise UserError(
            "tracking.mlflow_uri holds a user, password or token, and manifests hold the settings; give them "
            "in MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )


def check_ranges(settings: Settings) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: names the key, the value and the bound.
    """
    for key in _keys(settings.to_dict()):
        value = attrgetter(key)(settings)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be finite")
    for group, name, least in LEAST:
        value = attrgetter(f"{group}.{name}")(settings)
        if value is not None and value < least:
            raise UserError(f"{group}.{name}={value}: must be at least {least}")
    for group, name in POSITIVE:
        value = attrgetter(f"{group}.{name}")(settings)
        if value <= 0:
            raise UserError(f"{group}.{name}={value}: must be positive")
    for name in DIMENSIONS:
        if (value := getattr(settings.model.backbone, name)) < 1:
            raise UserError(f"model.dimensions.{name}={value}: must be at least 1")
    betas = settings.training.optimizer.betas
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"training.optimizer.betas={betas}: both must lie in [0, 1)")


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the arguments (default: the command line's) and run `command`.

    A `UserError` becomes one line and exit code 2.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    args = parser.parse_intermixed_args(arguments)
    try:
        sys.exit(command(args) or 0)
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _json(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{name}: must be a JSON {'object' if kind is dict else 'list'}, not {text:.40}")
    return value


def _parsed(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{override}: {reason}") from error


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


def omegaconf_line(error: OmegaConfBaseException) -> str:
    """The key that is wrong, and why."""
    key = getattr(error, "full_key", None)
    reason = str(error).splitlines()[0]
    return f"{key}: {reason}" if key else reason


def _hydra_line(error: Exception, overrides: Sequence[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    if key := re.search(r"Could not override '(.+?)'", line):
        near = difflib.get_close_matches(key[1], _keys(dataclasses.asdict(Settings())), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        reason = str(error.__cause__ or "").splitlines() or lines[1:] or [""]
        known = "no such key" if "not in" in reason[0] + line else reason[0]
        return f"{key[1]}: {known}{hint}"
    if line.startswith("Error merging override") and error.__cause__:
        return f"{line.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    return f"{line} (overrides: {' '.join(overrides)})" if overrides else line


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
