"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258). Its model: models/mod.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dynamic_transformers.constraints import OneOf, Weight
from dynamic_transformers.models.architectures.accounts import FlopAccount
from dynamic_transformers.models.architectures.base import RoutedArchitecture

if TYPE_CHECKING:
    from dynamic_transformers.models.configuration import Qwen2MoDConfig
    from dynamic_transformers.settings import ModelSettings

AUX_WEIGHT = 0.01  # measured: docs/selection_rules.md


@dataclass
class MoDSettings:
    """`model.mod`."""

    gate: Annotated[str, OneOf("sigmoid", "raw")] = "sigmoid"  # raw: the paper's formula
    aux_weight: Weight | None = None  # of the router's own membership loss; None: 0.01, of a control 0
    z_loss_weight: Weight = 0.0


class MoD(RoutedArchitecture):
    """A linear router scores each token; the best ones are computed.

    FLOPs: of the block and of a predictor in `RoutedArchitecture` (base.py), of the router here.
    """

    name, title = "mod", "MoD"
    description = "Mixture-of-Depths: every other layer computes only the tokens that a router selects"
    model_type, module, classes = "qwen2_mod", "mod", "Qwen2MoD"
    own_rules = ("aux",)
    parts: ClassVar[dict[str, str]] = {"router": "router", "predictor": "predictor"}

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """Gate and losses of the router."""
        default = 0.0 if model.is_control else AUX_WEIGHT
        given = model.mod.aux_weight
        own = vars(model.mod) | {"aux_weight": default if given is None else given}
        return super().options(model) | own

    def check(self, model: ModelSettings) -> None:
        """`aux` cuts the router's logits at 0, which its loss must have taught it."""
        if model.selection_rule == "aux" and model.mod.aux_weight == 0:
            raise ValueError("model.selection_rule=aux needs model.mod.aux_weight > 0")

    def learned_weights(self, model: ModelSettings) -> dict[str, float | None]:
        """That of the membership loss."""
        return {"mod.aux_weight": model.mod.aux_weight}

    def score_flops(self, config: Qwen2MoDConfig, training: bool) -> FlopAccount:
        """r = w·x."""
        return FlopAccount(router=(3 if training else 1) * 2.0 * config.hidden_size)


ARCHITECTURE = MoD()
