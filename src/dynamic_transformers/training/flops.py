"""Analytic FLOPs per token (docs/architectures.md).

Conventions: one multiply-add is 2 FLOPs; matrix products only (norms, activations, softmax and embedding
look-ups are not counted); attention scores are counted for all pairs of a row's computed tokens (T×T in a
dense layer, k×k in a routed one that computes k of them), without a discount for causality or documents;
recomputation under gradient checkpointing is not counted; work that a routed layer skips is not counted.
What each architecture adds stands in its record (models/architectures/). Rows that differ in k enter with
their own k²: `realised.py` sums them. Checked against `torch.utils.flop_counter.FlopCounterMode`
on the real modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import Qwen2Config

from dynamic_transformers.models.architectures import architecture_of
from dynamic_transformers.models.architectures.accounts import FlopAccount, block_flops
from dynamic_transformers.models.architectures.base import RoutedArchitecture
from dynamic_transformers.models.configuration import RoutedConfig


def forward_flops(
    config: Qwen2Config,
    length: float,
    fractions: Mapping[int, float] | None = None,
    keys: Mapping[int, float] | None = None,
) -> FlopAccount:
    """FLOPs per token of one forward in eval mode, by component.

    Args:
        config: of any architecture.
        length: T, tokens of a row, on average over tokens; for a cached step the past ones and the present.
        fractions: measured routed fraction by layer; missing layers take the configured capacity.
        keys: by routed layer, how many tokens a computed one is compared with, on average over computed
            tokens: Σk²/Σk of rows that compute k tokens, or what the cache holds in a cached step. Missing
            layers take fraction·T, which is right where all rows compute the same fraction.
    """
    architecture = architecture_of(config)
    account = FlopAccount(embeddings=0.0, lm_head=2.0 * config.hidden_size * config.vocab_size)
    for layer in range(config.num_hidden_layers):
        fraction = layer_fraction(config, layer, fractions)
        compared = (keys or {}).get(layer)
        account.add(architecture.forward_layer(config, layer, length, fraction, compared))
    return account


def calibration_flops(
    config: RoutedConfig,
    length: int,
    fractions: Mapping[int, float] | None = None,
    keys: Mapping[int, float] | None = None,
) -> FlopAccount:
    """FLOPs per token of the text that sets the thresholds, by component.

    A forward in eval mode below the last routed layer, where each score is computed once more before the
    threshold is known; of the last routed layer the score alone.

    Args:
        config, length, fractions, keys: as in `forward_flops`.
    """
    architecture = architecture_of(config)
    assert isinstance(architecture, RoutedArchitecture)
    account, router = FlopAccount(), architecture.router_flops(config, training=False)
    if config.selection_rule == "calibrated_predictor":
        score = FlopAccount(predictor=router["predictor"])
    else:
        score = router
    *below, last = config.routed_layers
    for layer in range(last):
        fraction = layer_fraction(config, layer, fractions)
        compared = (keys or {}).get(layer)
        account.add(block_flops(config, length, 1.0 if fraction is None else fraction, compared))
    account.add(router, len(below))
    account.add(score, len(below) + 1)
    return account


def training_flops(
    config: Qwen2Config, length: int, fractions: dict[int, float] | None = None
) -> FlopAccount:
    """FLOPs per token of one forward and backward in training mode, by component.

    The backward of a matrix product costs twice its forward.

    Args:
        config, length: as in `forward_flops`.
        fractions: places that each routed layer's block ran on ÷ all tokens; missing layers take the plan.
    """
    architecture = architecture_of(config)
    account = FlopAccount(embeddings=0.0, lm_head=3 * 2.0 * config.hidden_size * config.vocab_size)
    for layer in range(config.num_hidden_layers):
        fraction = layer_fraction(config, layer, fractions, training=True)
        account.add(architecture.training_layer(config, layer, length, fraction))
    return account


def target_fraction(config: Qwen2Config) -> float | None:
    """Fraction of tokens that a routed layer is meant to compute; None where only a gate decides."""
    return getattr(config, "target_fraction", 1.0)


def layer_fraction(
    config: Qwen2Config, layer: int, fractions: Mapping[int, float] | None, training: bool = False
) -> float | None:
    """Routed fraction of a layer, the planned one where it was not measured; None for a dense one."""
    if not isinstance(config, RoutedConfig) or layer not in config.routed_layers:
        return None
    return (fractions or {}).get(layer, config.training_fraction if training else config.capacity)
