"""Set thresholds by what evaluation sees on given tokens, for benchmarks that need a known fraction."""

from __future__ import annotations

import torch

from dynamic_transformers.models import RoutedForCausalLM
from dynamic_transformers.models.routing import Router
from dynamic_transformers.models.selection import score_quantile


@torch.no_grad()
def calibrate(model: RoutedForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
    """Make each routed layer's threshold select the fraction γ of these tokens.

    From the first layer upwards, since a layer's scores depend on what the layers below select.

    Args:
        model: with `selection_rule="threshold"`; in eval mode afterwards.
        input_ids, position_ids: (B, T) each.
    """
    model.eval()
    for layer in model.config.routed_layers:
        score = model.model(input_ids, position_ids=position_ids, use_cache=False).routing[layer].score
        router = model.model.routers[str(layer)]
        assert isinstance(router, Router)
        router.threshold.value.copy_(score_quantile(score, model.config.capacity, None))
