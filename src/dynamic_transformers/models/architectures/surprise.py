"""What SDT and STT share (Wieser et al. 2025, arXiv 2511.21408). The modules: models/surprise.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dynamic_transformers.constraints import Count, In, OneOf, Positive, Steps, Weight
from dynamic_transformers.models.architectures.base import RoutedArchitecture

if TYPE_CHECKING:
    from dynamic_transformers.models.configuration import SurpriseConfig
    from dynamic_transformers.settings import ModelSettings


@dataclass
class SurpriseSettings:
    """`model.surprise`: the gate of SDT and STT, and the prior network."""

    offset_ce_init: Positive = 1.025
    multiplier_cu_init: Positive = 1.1
    window: Count = 100
    beta_start: Positive = 0.1
    beta_end: Positive = 100.0
    beta_warmup_steps: Steps = 100
    beta_schedule: Annotated[str, OneOf("linear", "cosine")] = "linear"
    normalize: Annotated[str, OneOf("none", "moving_average", "state")] = "none"
    prior_factor: Annotated[float, In("(0, 8]")] = 0.0625  # of hidden_size: the width of the prior network
    prior_loss_weight: Weight = 0.05


class SurpriseArchitecture(RoutedArchitecture):
    """One whose targets are the tokens that surprise a prior network."""

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """Gate and prior."""
        surprise = dict(vars(model.surprise))
        for name in ("window", "normalize"):
            surprise[f"surprise_{name}"] = surprise.pop(name)
        return super().options(model) | surprise

    @staticmethod
    def prior_flops(config: SurpriseConfig, training: bool) -> float:
        """Three linear maps of the prior network, per token."""
        from dynamic_transformers.models.surprise import prior_width

        return (3 if training else 1) * 6.0 * config.hidden_size * prior_width(config)
