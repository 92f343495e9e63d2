"""Sparse Dynamic Transformer, or "Subjective Depth Transformer" (Wieser et al. 2025, arXiv 2511.21408).

Its model: models/sdt.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dynamic_transformers.models.architectures.accounts import FlopAccount
from dynamic_transformers.models.architectures.surprise import SurpriseArchitecture

if TYPE_CHECKING:
    from dynamic_transformers.models.configuration import Qwen2SDTConfig


class SDT(SurpriseArchitecture):
    """Layers work in pairs: the surprise of the first decides for the second."""

    name, title = "sdt", "SDT"
    description = (
        "Sparse Dynamic Transformer: a dense layer's surprise decides which tokens the next layer computes"
    )
    model_type, module, classes = "qwen2_sdt", "sdt", "Qwen2SDT"
    parts: ClassVar[dict[str, str]] = {"prior": "prior", "surprise": "surprise", "predictor": "predictor"}

    def score_flops(self, config: Qwen2SDTConfig, training: bool) -> FlopAccount:
        """The prior network, in evaluation too."""
        return FlopAccount(prior=self.prior_flops(config, training))


ARCHITECTURE = SDT()
