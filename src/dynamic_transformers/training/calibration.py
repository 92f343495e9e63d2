"""Thresholds set by what evaluation sees: the last thing that a run does.

A moving average over training steps has seen top-k decide in the layers below, which evaluation does not
know; deeper layers then miss γ by 5 points and more. Text that is neither trained nor tested on says where
the quantile of evaluation lies. A few documents are too few: they differ in how they are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dynamic_transformers.models import RoutedForCausalLM
from dynamic_transformers.models.routing import Router
from dynamic_transformers.models.selection import score_quantile
from dynamic_transformers.training.flops import target_fraction

Batches = Iterable[dict[str, torch.Tensor]]


@torch.no_grad()
def calibrate(model: RoutedForCausalLM, batches: Batches) -> None:
    """Make the threshold of the model's selection rule, if it has one, select the fraction γ of these tokens.

    Layer by layer from the first, since a layer's scores depend on what the layers below select. Nothing is
    done where the number of selected tokens is not meant to be γ (STT with `targets: threshold`).

    Args:
        model: in eval mode afterwards.
        batches: `input_ids` and `position_ids`, (B, T) each; read once for each routed layer.
    """
    model.eval()
    capacity, rule = target_fraction(model.config), model.config.selection_rule
    if capacity is None or rule not in ("threshold", "calibrated_predictor"):
        return
    for router in model.model.routers.values():
        assert isinstance(router, Router)
        if rule == "threshold":
            scores = watch(model, batches, router, lambda output: output[1].score)
            router.threshold.value.copy_(score_quantile(scores, capacity, None))
        else:
            assert router.predictor is not None
            logits = watch(model, batches, router.predictor, lambda output: output)
            router.predictor.threshold.value.copy_(score_quantile(logits, capacity, None))


def watch(
    model: RoutedForCausalLM, batches: Batches, module: nn.Module, take: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """What `take` makes of the module's output, (B, T) for each batch, for all batches."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: seen.append(take(output)))
    for batch in batches:
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        model.model(ids, position_ids=positions, use_cache=False)
    hook.remove()
    return torch.cat(seen)
