"""Hydra's configuration files, overrides and parameters of pipelines → checked `Settings`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynamic_transformers.checks import check
from dynamic_transformers.constraints import first_violation
from dynamic_transformers.hydra_files import compose_files, parse
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.plugin import add_plugin, read_plugin
from dynamic_transformers.reading import MisfitError, at_home, hint_at, plain_type, read
from dynamic_transformers.settings import EMBEDDED, ModelSettings, Settings, SourceSettings, UserError

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
    merged: Any = functools.reduce(laid_over, values, {})
    for override in overrides:
        merged = apply(merged, override)
    merged, plugin = without_plugin(merged)
    if "${" in json.dumps(merged, default=str):
        try:
            merged = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(omegaconf_line(error)) from error
    settings = read(Settings, merged)
    name_sources(settings.data.dataset_configs)
    settings.model.plugin = plugin
    settings.model.options = read_options(settings.model)
    check(settings)
    return settings


def name_sources(sources: Sequence[SourceSettings]) -> None:
    """Give each source without a name one of its own, of the last part of its path and its configuration.

    Raises:
        UserError: it has no path either, or is an embedded one, which its name chooses.
    """
    taken = {source.name for source in sources}
    for index, source in enumerate(sources):
        if source.name:
            continue
        if source.path in (None, EMBEDDED):
            raise UserError(
                f"data.dataset_configs[{index}]: give a path; with path=embedded a name too, of "
                "which there are prose, code and math"
            )
        parts = (PurePath(str(source.path)).name, source.config)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(filter(None, parts))).strip("-.") or "source"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        source.name = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(source.name)


def without_plugin(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The settings without `model.plugin`, and the files of the plugin, whose architecture is known then.

    Raises:
        UserError: there is no such file, or no architecture in it.
    """
    model = values.get("model")
    if not isinstance(model, dict) or model.get("plugin") is None:
        return values, None
    plugin = model["plugin"]
    try:
        if isinstance(plugin, dict):
            add_plugin(plugin)
        else:
            plugin = read_plugin(Path(at_home(str(plugin))))
    except ValueError as error:
        raise UserError(f"model.plugin: {error}") from error
    return values | {"model": model | {"plugin": None}}, plugin


def read_options(model: ModelSettings) -> dict[str, Any]:
    """`model.options` as the settings of the plugin's record say, defaults included.

    Raises:
        UserError: there is no plugin, or it has not these options, or not such values.
    """
    record = ARCHITECTURES.get(model.type)  # `check` refuses one that is not known
    if record is None or record.settings is None:  # of another variant, where there is a plugin
        if model.options and not model.plugin:
            raise UserError("model.options are those of a model.plugin, and there is none")
        if model.options and record is not None and model.uses_plugin:
            raise UserError(f"model.options: {model.type} has none (its record names no `settings`)")
        return model.options
    options = read(record.settings, model.options, ("model", "options"))
    if refused := first_violation(options):
        raise UserError(f"model.options.{refused}")
    return dataclasses.asdict(options)


def laid_over(values: Any, over: Any) -> Any:
    """Nested dictionaries as one; anything else takes the place of what was there."""
    if not (isinstance(values, dict) and isinstance(over, dict)):
        return over
    return values | {name: laid_over(values.get(name), entry) for name, entry in over.items()}


def apply(values: dict[str, Any], override: str) -> Any:
    """Plain settings with one `key=value` over them.

    A text is taken as it is written, without quotes around it; lists and mappings are YAML.

    Raises:
        UserError: no such key, or not of that form.
    """
    key, text = split_override(override)
    path = tuple(
        int(part) if part.isdecimal() else part for part in key.replace("[", ".").replace("]", "").split(".")
    )
    return _put(values, path, 0, _value(hint_at(Settings, path), text, override))


def _put(values: Any, path: tuple[int | str, ...], depth: int, value: Any) -> Any:
    """`values`, found at the first `depth` parts of a path, with `value` at its end."""
    if depth == len(path):
        return laid_over(values, value)
    part = path[depth]
    if isinstance(values, list | tuple):
        if not (isinstance(part, int) and part < len(values)):
            raise MisfitError(path, ": no such entry")
        return [
            _put(entry, path, depth + 1, value) if index == part else entry
            for index, entry in enumerate(values)
        ]
    known = values if isinstance(values, dict) else {}
    return known | {str(part): _put(known.get(str(part)), path, depth + 1, value)}


def split_override(override: str) -> tuple[str, str]:
    """Key and value of `key=value`; a + in front, as Hydra wants it for new keys, says nothing here.

    Raises:
        UserError: it has no key or no value, or asks to remove a setting.
    """
    key, equals, value = override.partition("=")
    key = key.strip().lstrip("+")
    if not equals or not key.strip("."):
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
    variants: str,
    grid: str,
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
        variants, grid: JSON objects as `study` has them, in place of those of `settings`; '' leaves these.
        overrides: `key=value` each.
        dataset_configs: JSON list of sources; '' leaves those of `settings`.
        max_flops: budget of each run in training FLOPs; 0 leaves that of `settings`.
        mlflow_uri, mlflow_experiment: '' leaves those of `settings`.

    Raises:
        UserError: as `settings_from_dict`, or not the JSON that is asked for.
    """
    values = _json("settings", settings, dict)
    for name, text in (("variants", variants), ("grid", grid)):
        if text:
            values.setdefault("study", {})[name] = _json(name, text, dict)
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
