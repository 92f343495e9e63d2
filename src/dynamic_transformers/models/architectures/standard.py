"""The standard model: transformers' own Qwen2."""

from dynamic_transformers.models.architectures.base import Architecture


class Standard(Architecture):
    """Every layer computes every token."""

    name, title = "standard", "Standard"
    description = "transformers' own Qwen2: every layer computes every token"
    model_type, classes = "qwen2", "Qwen2"


ARCHITECTURE = Standard()
