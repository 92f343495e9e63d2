"""Hydra's configuration files, overrides and parameters of pipelines → checked `Settings`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynamic_transformers.checks import check
from dynamic_transformers.hydra_files import compose_files, parse
from dynamic_transformers.reading import MisfitError, hint_at, plain_type, read
from dynamic_transformers.settings import ARCHITECTURES, SEED, Settings, UserError

CONFIG_DIR = Path(__file__).parent / "config"  # package data; in a checkout a link to config/
NULL = ("null", "Null", "NULL", "~")


def config_folders(config_dir: Path | None = None) -> list[Path]:
    """Where configuration files are looked for: `config_dir`, else config/ of the working folder; then ours.

    Raises:
        UserError: `config_dir` is no folder.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    own = config_dir or Path("config")
    return [own, CONFIG_DIR] if own.is_dir() else [CONFIG_DIR]


def compose_settings(
    config_name: str = "default", overrides: Sequence[str] = (), config_dir: Path | None = None
) -> Settings:
    """Compose `config_name.yaml` with Hydra and return checked `Settings`.

    Args:
        overrides: `key=value` each; a `group=option` chooses a file of a configuration group.
        config_dir: the user's own files, which win over those of the package; None: config/ if there is one.

    Raises:
        UserError: no such file, bad override, unknown key, wrong type, impossible combination.
    """
    folders = config_folders(config_dir)
    config_name = config_name.removesuffix(".yaml")
    if not any((folder / f"{config_name}.yaml").is_file() for folder in folders):
        known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        near = difflib.get_close_matches(config_name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"no configuration {config_name!r} in {folders[0]}; {hint}there are: {', '.join(known)}"
        )
    choices = [override for override in overrides if _is_choice(override, folders)]
    values = compose_files(folders, config_name, choices)
    return settings_from_dict(values, overrides=[entry for entry in overrides if entry not in choices])


def _is_choice(override: str, folders: Sequence[Path]) -> bool:
    """Whether it is `group=option`, a file in one of the folders' groups.

    Raises:
        UserError: the group has no such file.
    """
    group, option = split_override(override)
    files = [file for folder in folders for file in (folder / group).glob("*.yaml")]
    if "." in group or not files or option.startswith("{"):
        return False
    known = sorted({file.stem for file in files})
    if option not in known:
        raise UserError(f"{override}: no {group}/{option}.yaml; there are: {', '.join(known)}")
    return True


def settings_from_dict(*values: dict[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Build and check `Settings`.

    Args:
        values: nested dictionaries, each over those before; missing keys take the dataclasses' defaults.
        overrides: `key=value` strings, as on the command line.

    Raises:
        UserError: unknown key, wrong type, or an impossible combination.
    """
    try:
        config = OmegaConf.merge({}, *values)
        assert isinstance(config, DictConfig)
        for override in overrides:
            apply(config, override)
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_line(error)) from error
    settings = read(Settings, plain)
    check(settings)
    return settings


def apply(config: DictConfig, override: str) -> None:
    """Put one `key=value` into plain settings.

    A text is taken as it is written, without quotes around it; lists and mappings are YAML.

    Raises:
        UserError: no such key, or not of that form.
    """
    key, text = split_override(override)
    path = tuple(
        int(part) if part.isdecimal() else part for part in key.replace("[", ".").replace("]", "").split(".")
    )
    value = _value(hint_at(Settings, path), text, override)
    place = OmegaConf.select(config, key.rpartition(".")[0]) if len(path) > 1 else config
    *_, index = path
    if isinstance(index, int) and (place is None or index >= len(place)):
        raise MisfitError(path, f": no such entry; there are {len(place or [])}")
    OmegaConf.update(config, key, value, merge=True)


def split_override(override: str) -> tuple[str, str]:
    """Key and value of `key=value`; a + in front, as Hydra wants it for new keys, says nothing here.

    Raises:
        UserError: it has no key or no value, or asks to remove a setting.
    """
    key, equals, value = override.partition("=")
    key = key.strip().lstrip("+")
    if not equals or not key:
        raise UserError(f"{override!r} is not of the form key=value")
    if key.startswith("~"):
        raise UserError(f"{override}: a setting cannot be removed; give it a value, or null")
    return key, value


def _value(hint: Any, text: str, override: str) -> Any:
    """What the text of an override means for a field: text, null, or YAML where it can be more than that."""
    base, optional = plain_type(hint)
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted and base in (str, Any):
        mark = text[0]
        return text[1:-1].replace(f"\\{mark}", mark)
    if text in NULL and (optional or base is not str):
        return None
    if base in (str, int, float, bool) or (base is Any and not text.startswith(("[", "{"))):
        if base is str and text in NULL[:-1]:
            return None  # refused with the hint to write it in quotes
        return text
    value = parse(text, override)[0]
    if dataclasses.is_dataclass(base) and not isinstance(value, dict):
        raise UserError(f"{override}: must be a mapping of keys to values")
    return value


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
    changes = {group: entries for group, entries in changes.items() if entries}
    result = settings_from_dict(values, changes, overrides=[str(entry) for entry in overrides])
    if not (result.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        result.tracking.mlflow = False
    return result


def run_names(architectures: Sequence[str], seeds: Sequence[int | float]) -> list[str]:
    """`architecture:seed` of every run of a pipeline; KFP's local runner makes floats of whole numbers.

    Raises:
        UserError: an unknown architecture, a seed that is no whole number, or one named twice.
    """
    for name in architectures:
        if name not in ARCHITECTURES:
            raise UserError(f"architectures={name}: must be one of {', '.join(ARCHITECTURES)}")
    for seed in seeds:
        if not isinstance(seed, int | float) or not SEED.allows(seed) or not float(seed).is_integer():
            raise UserError(f"seeds: {seed} must be a whole number in {SEED.interval}")
    names = [f"{architecture}:{int(seed)}" for seed in seeds for architecture in architectures]
    if not names or len(set(names)) < len(names):
        raise UserError("architectures and seeds: name at least one of each, and each once")
    return names


def omegaconf_line(error: OmegaConfBaseException) -> str:
    """The key that is wrong, and why."""
    key = getattr(error, "full_key", None)
    reason = str(error).splitlines()[0]
    return f"{key}: {reason}" if key else reason


def _json(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{name}: must be a JSON {'object' if kind is dict else 'list'}, not {text:.40}")
    return value
