"""Thresholds of an exported model set anew, for another domain or another γ, in a folder of its own."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from dynamic_transformers.data.loading import batches_of, load_split, verify_split
from dynamic_transformers.evaluation.exported import TOKENIZER, load_config, load_model, unreadable_weights
from dynamic_transformers.evaluation.results import RESULTS
from dynamic_transformers.evaluation.routing_page import PAGE, PICTURE
from dynamic_transformers.folders import check_target
from dynamic_transformers.manifest import (
    MANIFEST,
    file_digest,
    finished,
    input_folder,
    read_manifest,
    step_output,
    write_json,
    write_manifest,
)
from dynamic_transformers.model_card import CARD
from dynamic_transformers.models.configuration import RoutedConfig
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.models.state import KINDS
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.calibration import (
    calibrate,
    calibration_cost,
    calibration_rows,
    is_calibrated,
)

logger = logging.getLogger("dynamic_transformers")

STATE = "model.routing_state."  # in front of the names of its tensors
LEFT = (MANIFEST, RESULTS, PAGE, PICTURE, CARD)  # of the model before; they are not true of the new one
# What each manifest says of its own folder, or of its own weights.
OWN = ("schema_version", "step", "config", "config_digest", "inputs", "package_version", "git_revision")
OWN += ("packages", "digest", "logits_difference", "calibrated_fraction")


def recalibrate(
    model_dir: Path, data_dir: Path, capacity: float | None = None, output_dir: Path | None = None
) -> Path:
    """Write an exported model with thresholds that select γ of the validation split of a data folder.

    All other weights stay as they are, bit for bit. The thresholds of other selection rules belong to other
    text or another γ, and count as never set. The new folder is an export that
    `bench` takes like any other, and that `evaluate` refuses.

    Args:
        model_dir: folder that `export` wrote, or this function; it does not change.
        data_dir: folder that `prepare` wrote with the model's tokenizer.
        capacity: γ; None: the model's own.
        output_dir: default: a folder beside the model's, named after data and γ.

    Returns:
        The new folder; a finished one of the same model, data and γ is returned as it is.

    Raises:
        UserError: the model has no threshold to set, the data are of another tokenizer, or there is something
            else in `output_dir`.
    """
    made, data = read_manifest(model_dir, "export"), read_manifest(data_dir, "prepare_data")
    config = load_config(model_dir)
    refuse_without_threshold(model_dir, config)
    refuse_another_tokenizer(model_dir, data_dir)
    verify_split(data_dir, "validation")
    assert isinstance(config, RoutedConfig)
    config.capacity = capacity or config.capacity
    asked = {"model_digest": made["digest"], "data_digest": data["digest"], "capacity": config.capacity}
    output_dir = output_dir or beside(model_dir, data_dir, config.capacity)
    check_target(output_dir)
    if not finished(output_dir, "export", asked) and output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir}: holds something else; name another folder with --output_dir")
    with step_output(output_dir, "export", asked) as output:
        if output is not None:
            fill(output, model_dir, data_dir, config, asked)
    return output_dir


def beside(model_dir: Path, data_dir: Path, capacity: float) -> Path:
    """A folder beside the model's, named after it, the data and γ."""
    model = model_dir.resolve()
    return model.with_name(f"{model.name}-{data_dir.resolve().name}-capacity-{capacity:g}")


def fill(output: Path, model_dir: Path, data_dir: Path, config: RoutedConfig, asked: dict[str, Any]) -> None:
    """Write the recalibrated model into an empty folder."""
    made, data = read_manifest(model_dir), read_manifest(data_dir)
    model = load_model(model_dir, config)
    assert isinstance(model, RoutedForCausalLM)
    state = model.routing_state
    state.thresholds.zero_()
    state.weights.zero_()
    if config.capacity * data["block_size"] < 1:
        logger.warning(
            "calibrate: capacity %g is less than one token of a block of %d: most blocks will have none",
            config.capacity,
            data["block_size"],
        )
    rows = calibration_rows(load_split(data_dir, "validation"), data["block_size"])
    fractions, keys = calibrate(model, batches_of(rows, 1))
    for layer, fraction in fractions.items():
        logger.info("calibrate: layer %d computes %.4f of the text", layer, fraction)
    for path in model_dir.iterdir():
        if path.is_file() and path.name not in LEFT and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)
    write_state(output, {f"{STATE}{name}": value.cpu() for name, value in state.named_buffers()})
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", written | {"capacity": config.capacity})
    facts = {key: value for key, value in made.items() if key not in OWN}
    facts["training_flops"] += calibration_cost(config, rows, data["block_size"], fractions, keys)
    # What tells variants apart: the data only where they are not those that the model learned from.
    own_content = made["run_config"]["data_digest"] == data["content_digest"]
    facts["run_config"] = made["run_config"] | {
        "calibration.capacity": config.capacity,
        "calibration.data_digest": None if own_content else data["content_digest"],
    }
    inputs = {"model": model_dir, "calibration_data": data_dir, **own_data(model_dir)}
    write_manifest(output, "export", asked, inputs, **facts, calibrated_fraction=fractions)


def own_data(model_dir: Path) -> dict[str, Path]:
    """The data that the model was trained with, whose test split it has not seen; empty if they are gone."""
    try:
        return {"data": input_folder(model_dir, "data")}
    except (UserError, KeyError):
        return {}


def refuse_without_threshold(model_dir: Path, config: PreTrainedConfig) -> None:
    """Refuse a model that no threshold makes select γ.

    Raises:
        UserError: says why.
    """
    if not isinstance(config, RoutedConfig):
        raise UserError(f"{model_dir}: a {config.model_type} model routes nothing, so it has no thresholds")
    if not is_calibrated(config):
        rule = config.selection_rule
        why = "its targets are no fraction" if rule in KINDS else f"selection_rule={rule} reads none"
        raise UserError(f"{model_dir}: has no threshold to set: {why}")


def refuse_another_tokenizer(model_dir: Path, data_dir: Path) -> None:
    """Refuse data whose token ids mean something else to the model.

    Raises:
        UserError: the two files of the tokenizer differ.
    """
    file = model_dir / TOKENIZER
    model = file_digest(file) if file.is_file() else "none"
    data = read_manifest(data_dir).get("tokenizer_files", {}).get(TOKENIZER, "none")
    if model != data:
        raise UserError(
            f"{data_dir}: made with another tokenizer than the model's ({data:.12}, {model:.12}); prepare "
            f"the text with data.tokenizer_name={model_dir}"
        )


def refuse_an_unset_threshold(model_dir: Path, rule: str) -> None:
    """Refuse a selection rule whose thresholds were neither averaged in training nor calibrated.

    Raises:
        UserError: says so, or that the weights are damaged.
    """
    state = read_state(model_dir)
    if rule not in KINDS or not state:
        return
    kind = KINDS[rule]
    if not any(state[f"{STATE}{name}"][kind].any() for name in ("thresholds", "weights")):
        raise UserError(
            f"--selection_rule={rule}: its thresholds were never set in {model_dir}; use the model's own rule"
        )


def read_state(folder: Path) -> dict[str, Tensor]:
    """Thresholds and β as a model's folder holds them; empty where there are none.

    Raises:
        UserError: a file of the weights is damaged.
    """
    found = {}
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(STATE)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable_weights(folder, error) from error
    return found


def write_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Put other thresholds into a model's folder."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if new := {name: value for name, value in state.items() if name in tensors}:
            save_file(tensors | new, path, metadata={"format": "pt"})
