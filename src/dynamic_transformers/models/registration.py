"""Our models, made known to transformers' auto classes."""

from contextlib import suppress

import transformers

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.carried import KINDS


def register_models() -> None:
    """Let `AutoConfig`, `AutoModelForCausalLM` and their like know each architecture."""
    for record in ARCHITECTURES.values():
        if record.module:
            transformers.AutoConfig.register(record.model_type, record.config_class, exist_ok=True)
            for auto, kind in KINDS.items():
                with suppress(AttributeError):  # a plugin need not have all
                    getattr(transformers, auto).register(
                        record.config_class, record.class_of(kind), exist_ok=True
                    )
