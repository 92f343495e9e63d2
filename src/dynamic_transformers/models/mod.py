"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

Every odd layer is routed. A bias-free router gives each token r = w·x. Training computes the k best tokens
of a row; inference those that its causal rule selects. Selected: y = x + g·(F(x̃) − x), g = σ(r) or, as in
the paper's equation 1, g = r. Others: y = x.
"""

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .configuration import Qwen2MoDConfig
from .modeling import RoutedForCausalLM, RoutedModel
from .routing import Router, RoutingContext, masked_mean, membership_loss, routed_update
from .selection import RoutingResult


class MoDRouter(Router):
    """Router of one MoD layer."""

    def __init__(self, config: Qwen2MoDConfig):
        super().__init__(config)
        self.config: Qwen2MoDConfig = config
        self.router = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self,
        block: Qwen2DecoderLayer,
        hidden_states: Tensor,
        previous_hidden_states: Tensor,
        context: RoutingContext,
    ) -> tuple[Tensor, RoutingResult]:
        """Hidden states (B, T, D) after the routed layer, and what it reports."""
        # A sum of products instead of nn.Linear keeps scores in fp32 under autocast.
        logits = (hidden_states.float() * self.router.weight.float()).sum(-1)
        scores = torch.rand_like(logits) if self.config.routing == "random" else logits
        gate = torch.sigmoid(logits) if self.config.gate == "sigmoid" else logits
        losses = {}
        if self.training:
            selection, losses = self.select_for_training(scores, hidden_states, context)
            if self.config.aux_weight:
                losses["aux"] = (self.config.aux_weight, membership_loss(logits, selection, context.valid))
            if self.config.z_loss_weight:
                losses["z"] = (self.config.z_loss_weight, masked_mean(logits.square(), context.valid))
        else:
            selection = self.select(scores, hidden_states, context)
        output = routed_update(block, hidden_states, selection, gate, context)
        return output, selection.result(scores, gate, losses)


class Qwen2MoDModel(RoutedModel):
    """Qwen2 backbone with MoD layers."""

    config: Qwen2MoDConfig
    router_class = MoDRouter


class Qwen2MoDForCausalLM(RoutedForCausalLM):
    """Mixture-of-Depths language model."""

    config: Qwen2MoDConfig
    model_class = Qwen2MoDModel


Qwen2MoDConfig.register_for_auto_class()
Qwen2MoDForCausalLM.register_for_auto_class("AutoModelForCausalLM")
