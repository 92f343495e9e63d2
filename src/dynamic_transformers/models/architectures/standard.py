"""The standard model: transformers' own Qwen2."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from dynamic_transformers.models.architectures.base import Architecture

if TYPE_CHECKING:
    from transformers import Qwen2Config


class Standard(Architecture):
    """Every layer computes every token."""

    name, title = "standard", "Standard"
    description = "transformers' own Qwen2: every layer computes every token"
    model_type, classes = "qwen2", "Qwen2"

    @cached_property
    def config_class(self) -> type[Qwen2Config]:
        """transformers'."""
        from transformers import Qwen2Config

        return Qwen2Config

    def class_of(self, kind: str) -> Any:
        """transformers'."""
        import transformers

        return getattr(transformers, f"{self.classes}{kind}")
