"""Our models, made known to transformers' auto classes."""

import transformers

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.carried import KINDS

_ours: set[str] = set()  # model types that transformers has from us


def register_models() -> None:
    """Let `AutoConfig`, `AutoModelForCausalLM` and their like know each architecture.

    Raises:
        ValueError: transformers has another model of that `model_type`.
    """
    for record in ARCHITECTURES.values():
        if record.module:
            again = record.model_type in _ours
            transformers.AutoConfig.register(record.model_type, record.config_class, exist_ok=again)
            _ours.add(record.model_type)
            for auto, kind in KINDS.items():
                if hasattr(record.code, f"{record.classes}{kind}"):  # a plugin need not have all
                    auto_class = getattr(transformers, auto)
                    auto_class.register(record.config_class, record.class_of(kind), exist_ok=True)
