"""Settings → model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from dynamic_transformers.settings import ModelSettings, Settings, UserError

logger = logging.getLogger("dynamic_transformers")


def model_config(
    model: ModelSettings, vocab_size: int, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> Qwen2Config:
    """Configuration of the architecture and size that `model` asks for.

    Args:
        vocab_size: rows of the embedding, which is the tokenizer's length.
        bos_token_id, eos_token_id: what documents begin and end with. There is no padding token: its
            embedding would not be trained.
    """
    size = model.backbone
    backbone = dict(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        initializer_range=size.initializer_range,
        max_position_embeddings=size.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=size.tie_word_embeddings,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    return model.architecture.configuration(backbone, model)


def build_model(
    settings: Settings,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """A new model in training mode, initialised from `run.seed` or from a pretrained Qwen2.

    All architectures of one seed share the backbone's initial weights (with tied embeddings).

    Args:
        vocab_size: rows of the embedding, which is the tokenizer's length.
        bos_token_id, eos_token_id, pad_token_id: what a new model's generation begins, ends and pads with; a
            pretrained one keeps its own.

    Raises:
        UserError: the pretrained checkpoint cannot be read or does not fit.
    """
    torch.manual_seed(settings.run.seed)
    if settings.training.mode == "pretrained":
        model = load_pretrained(settings)
        if vocab_size > model.config.vocab_size:
            raise UserError(
                f"data.tokenizer_name has {vocab_size} entries, model.pretrained={settings.model.pretrained} "
                f"knows {model.config.vocab_size}; use the tokenizer of that model"
            )
        return model
    config = model_config(settings.model, vocab_size, bos_token_id, eos_token_id)
    config._attn_implementation = settings.model.attention
    model = settings.model.architecture.model_class(config).train()
    model.generation_config.pad_token_id = pad_token_id
    return model


def load_pretrained(settings: Settings) -> PreTrainedModel:
    """A routed (or standard) model with every weight of a pretrained Qwen2; only the routers are new.

    How the source generates (ends of text, sampling) is kept.

    Raises:
        UserError: no such checkpoint, not a Qwen2, or tensors that do not map, by name.
    """
    source_name = settings.model.pretrained
    assert source_name is not None
    source_config = read_pretrained(AutoConfig, source_name)
    if source_config.model_type != "qwen2":
        raise UserError(f"model.pretrained={source_name}: model_type {source_config.model_type!r}, not qwen2")
    if source_config.use_sliding_window:
        raise UserError(f"model.pretrained={source_name}: sliding-window attention is not supported")
    source, report = read_pretrained(
        AutoModelForCausalLM,
        source_name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
    )
    unfit = {*report["missing_keys"], *report["unexpected_keys"]}
    unfit |= {name for name, *_ in report["mismatched_keys"]}
    if unfit:
        raise UserError(
            f"model.pretrained={source_name}: tensors missing, unknown or of another shape: "
            f"{', '.join(sorted(unfit))}"
        )
    architecture = settings.model.architecture
    backbone = source_config.to_dict()
    backbone.pop("model_type")
    try:
        config = architecture.configuration(backbone, settings.model)
    except ValueError as error:
        raise UserError(f"model.pretrained={source_name}: {error}") from error
    config._attn_implementation = settings.model.attention
    model = architecture.model_class(config)
    model.generation_config = source.generation_config
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    dropped = [name for name in missing if not name.startswith(architecture.new_parts)] + list(unexpected)
    if dropped:
        raise UserError(f"model.pretrained={source_name}: tensors that do not map: {', '.join(dropped)}")
    logger.info("%s: %d tensors mapped, %d new", source_name, len(source.state_dict()), len(missing))
    for name in missing:
        logger.debug("new: %s", name)
    return model.train()


def read_pretrained(auto_class: Any, source_name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained`; what it cannot read becomes a `UserError`."""
    try:
        return auto_class.from_pretrained(source_name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained={source_name}: {str(error).splitlines()[0]}") from error
