"""Thresholds set by what evaluation sees: the last thing that a run does.

A moving average over training steps has seen top-k decide in the layers below, which evaluation does not
know; deeper layers then miss γ by 5 points and more. Text that is neither trained nor tested on says where
the quantile of evaluation lies. A few documents are too few: they differ in how they are scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn

from dynamic_transformers.models import RoutedForCausalLM
from dynamic_transformers.models.routing import Router
from dynamic_transformers.models.selection import score_quantile
from dynamic_transformers.training.flops import target_fraction
from dynamic_transformers.training.heldout import fixed_randomness

Batches = Iterable[dict[str, torch.Tensor]]


class EnoughSeenError(Exception):
    """Ends a forward whose later layers nobody needs."""


@torch.no_grad()
def calibrate(model: RoutedForCausalLM, batches: Batches) -> None:
    """Make the threshold of the model's selection rule, if it has one, select the fraction γ of these tokens.

    Layer by layer from the first, since a layer's scores depend on what the layers below select; in the
    precision of the weights, as exported models are evaluated. Nothing is done where the number of selected
    tokens is not meant to be γ (STT with `targets: threshold`).

    Args:
        model: in eval mode afterwards.
        batches: `input_ids` and `position_ids`, (B, T) each; gone through once for each routed layer. With
            several ranks, all of them on every rank.
    """
    model.eval()
    capacity, rule = target_fraction(model.config), model.config.selection_rule
    if capacity is None or rule not in ("threshold", "calibrated_predictor"):
        return
    for place, router in enumerate(model.model.routers.values()):
        router = cast(Router, router)  # of an exported folder's code, perhaps
        if rule == "threshold":
            scores = watch(model, batches, router, lambda output: output[1].score)
            model.routing_state.set_threshold(0, place, score_quantile(scores, capacity, None))
        else:
            assert router.predictor is not None
            logits = watch(model, batches, router.predictor, lambda output: output)
            model.routing_state.set_threshold(1, place, score_quantile(logits, capacity, None))


def watch(
    model: RoutedForCausalLM, batches: Batches, module: nn.Module, take: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """What `take` makes of the module's output, (B, T) for each batch, for all batches."""
    seen: list[torch.Tensor] = []

    def note(_, inputs, output) -> None:
        seen.append(take(output))
        raise EnoughSeenError

    hook = module.register_forward_hook(note)
    try:
        with fixed_randomness(model.device):
            for batch in batches:
                ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
                with contextlib.suppress(EnoughSeenError):
                    model.model(ids, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    return torch.cat(seen)
