"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

Every odd layer is routed. A bias-free router gives each token r = w·x. Training computes the k best tokens
of a row, or those above a threshold; inference those that its causal rule selects. Selected:
y = x + g·(F(x̃) − x), g = σ(r) or, as in the paper's equation 1, g = r. Others: y = x.
"""

import torch
from torch import Tensor

from .classification import RoutedForSequenceClassification
from .configuration import Qwen2MoDConfig
from .heads import ScoreHead
from .language_model import RoutedForCausalLM
from .modeling import RoutedModel
from .routing import Block, Router, RoutingContext, membership_loss, routed_update, row_means
from .selection import RoutingResult
from .state import LayerState


class MoDRouter(Router):
    """Router of one MoD layer."""

    def __init__(self, config: Qwen2MoDConfig):
        super().__init__(config)
        self.config: Qwen2MoDConfig = config
        self.router = ScoreHead(config.hidden_size)

    def forward(
        self,
        block: Block,
        hidden_states: Tensor,
        previous_hidden_states: Tensor,
        context: RoutingContext,
        state: LayerState,
    ) -> tuple[Tensor, RoutingResult]:
        """Hidden states (B, T, D) after the routed layer, and what it reports."""
        logits = self.router(hidden_states)
        gate = torch.sigmoid(logits) if self.config.gate == "sigmoid" else logits
        losses, quantiles = {}, None
        if self.training:
            selection, losses, quantiles = self.select_for_training(logits, hidden_states, context, state)
            if self.config.aux_weight:
                losses["aux"] = (self.config.aux_weight, membership_loss(logits, selection, context.valid))
            if self.config.z_loss_weight:
                losses["z"] = (self.config.z_loss_weight, row_means(logits.square(), context.valid))
        else:
            selection = self.select(logits, hidden_states, context, state)
        output = routed_update(block, hidden_states, selection, gate, context)
        return output, selection.result(logits, gate, losses, quantiles=quantiles)


class Qwen2MoDModel(RoutedModel):
    """Qwen2 backbone with MoD layers."""

    config: Qwen2MoDConfig
    router_class = MoDRouter


class Qwen2MoDForCausalLM(RoutedForCausalLM):
    """Mixture-of-Depths language model."""

    config: Qwen2MoDConfig
    model_class = Qwen2MoDModel


class Qwen2MoDForSequenceClassification(RoutedForSequenceClassification):
    """Mixture-of-Depths under a classifier of whole texts."""

    config: Qwen2MoDConfig
    model_class = Qwen2MoDModel
