"""Reading an exported model: all of its weights, or none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from dynamic_transformers.manifest import MANIFEST, file_digest, read_manifest
from dynamic_transformers.models.plugin import staged_text
from dynamic_transformers.models.registration import register_models
from dynamic_transformers.settings import UserError

NAMES_SHOWN = 3
TOKENIZER = "tokenizer.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_config(model_dir: Path) -> PreTrainedConfig:
    """Configuration of an exported model.

    Raises:
        UserError: the folder holds none.
    """
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir}: no exported model (it has no config.json)")
    register_models()  # so that the code beside the weights is never run
    for file in model_dir.glob("*.py"):
        if staged_text(file.name) not in (None, file.read_text(encoding="utf-8")):
            raise UserError(f"{model_dir}: was made with another {file.name} than the plugin's")
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise UserError(
                f"{model_dir}: is of an architecture that is not ours; --plugin FILE names its record"
            ) from error
        raise UserError(f"{model_dir}: {str(error).splitlines()[0]}") from error


def trained_precision(model_dir: Path) -> str:
    """`system.precision` of the run that an exported model is of; fp32 where nothing says so."""
    if not (model_dir / MANIFEST).is_file():
        return "fp32"
    return read_manifest(model_dir).get("run_config", {}).get("system.precision", "fp32")


def tokenizer_digest(model_dir: Path) -> str:
    """SHA-256 of a model's tokenizer.json: models with the same one read the same ids.

    Raises:
        UserError: the model has none.
    """
    file = model_dir / TOKENIZER
    if not file.is_file():
        raise UserError(f"{model_dir}: has no {TOKENIZER}; export the model again")
    return file_digest(file)


def tokenizer_of(model_dir: Path) -> Any:
    """The tokenizer of an exported model; it reads texts as training did, and no special token in them."""
    register_models()  # AutoTokenizer reads config.json
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    tokenizer.split_special_tokens = True
    return tokenizer


def load_model(
    model_dir: Path, config: PreTrainedConfig | None = None, device: str | None = None, dtype: str = "fp32"
) -> PreTrainedModel:
    """An exported model in eval mode.

    Args:
        config: in place of the one in the folder.
        device: None: the GPU when there is one.
        dtype: of its weights, fp32 or bf16; scores are computed in fp32 in either.

    Raises:
        UserError: the folder holds no model, its weights are damaged, or they are not those of the model:
            transformers would draw missing ones at random.
    """
    config = config or load_config(model_dir)
    loader: Any = AutoModelForCausalLM
    try:
        with log_level("transformers", logging.ERROR):  # whose report is told in one line below
            model, report = loader.from_pretrained(
                model_dir,
                config=config,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable_weights(model_dir, error) from error
    for fault, names in (
        ("weights are missing", report["missing_keys"]),
        (
            "weights have another shape than config.json says",
            [name for name, *_ in report["mismatched_keys"]],
        ),
        ("weights are of another model than config.json says", report["unexpected_keys"]),
    ):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise UserError(f"{model_dir}: {fault}: {', '.join(sorted(names)[:NAMES_SHOWN])}{more}")
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def unreadable_weights(model_dir: Path, error: Exception) -> UserError:
    """What a library's error about a model's weights says to the user, in one line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{model_dir}: its weights cannot be read: {reason}")


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Another level of a logger within the body."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
