"""Analytic FLOPs per token (architectures.md, section 9).

Conventions: one multiply-add is 2 FLOPs; matrix products only (norms, activations, softmax and embedding
look-ups are not counted); attention scores are counted for all pairs of a row's computed tokens (T×T in a
dense layer, k×k in a routed one that computes k of them), without a discount for causality or documents;
recomputation under gradient checkpointing is not counted; work that a routed layer skips is not counted.
Rows that differ in k enter with their own k²: `realised.py` sums them. Checked against
`torch.utils.flop_counter.FlopCounterMode` on the real modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import Qwen2Config

from dynamic_transformers.models import RoutedConfig
from dynamic_transformers.models.configuration import (
    Qwen2MoDConfig,
    Qwen2SDTConfig,
    Qwen2STTConfig,
    SurpriseConfig,
)
from dynamic_transformers.models.surprise import prior_width


class FlopAccount(dict[str, float]):
    """FLOPs by component; a component that was never entered costs 0."""

    def __missing__(self, component: str) -> float:
        return 0.0

    def add(self, other: FlopAccount, factor: float = 1.0) -> None:
        """Enter every component of `other`, multiplied by `factor`."""
        for component, flops in other.items():
            self[component] += factor * flops

    def total(self) -> float:
        """Sum over the components."""
        return sum(self.values())


def block_flops(
    config: Qwen2Config, length: float, fraction: float = 1.0, keys: float | None = None
) -> FlopAccount:
    """Forward FLOPs of one decoder layer, per token of a row of `length` tokens with `fraction` computed.

    Args:
        keys: how many tokens a computed one is compared with, on average; None: those computed.
    """
    d, heads = config.hidden_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    return FlopAccount(
        qkvo=fraction * 2 * d * head_dim * (2 * heads + 2 * kv_heads),
        scores=fraction * (fraction * length if keys is None else keys) * 4 * heads * head_dim,
        mlp=fraction * 6 * d * config.intermediate_size,
    )


def forward_flops(
    config: Qwen2Config,
    length: float,
    fractions: Mapping[int, float] | None = None,
    keys: Mapping[int, float] | None = None,
) -> FlopAccount:
    """FLOPs per token of one forward in eval mode, by component.

    Args:
        config: of any of the four architectures.
        length: T, tokens of a row, on average over tokens; for a cached step the past ones and the present.
        fractions: measured routed fraction by layer; missing layers take the configured capacity.
        keys: by routed layer, how many tokens a computed one is compared with, on average over computed
            tokens: Σk²/Σk of rows that compute k tokens, or what the cache holds in a cached step. Missing
            layers take fraction·T, which is right where all rows compute the same fraction.
    """
    account = FlopAccount(embeddings=0.0, lm_head=2.0 * config.hidden_size * config.vocab_size)
    for layer in range(config.num_hidden_layers):
        fraction = layer_fraction(config, layer, fractions)
        compared = (keys or {}).get(layer)
        account.add(block_flops(config, length, 1.0 if fraction is None else fraction, compared))
        if fraction is not None:
            account.add(router_flops(config, training=False))
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
    account, router = FlopAccount(), router_flops(config, training=False)
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

    The backward of a matrix product costs twice its forward. STT is charged for its dense teacher.

    Args:
        config, length: as in `forward_flops`.
        fractions: places that each routed layer's block ran on ÷ all tokens; missing layers take the plan.
    """
    account = FlopAccount(embeddings=0.0, lm_head=3 * 2.0 * config.hidden_size * config.vocab_size)
    for layer in range(config.num_hidden_layers):
        fraction = layer_fraction(config, layer, fractions, training=True)
        if fraction is None:
            account.add(block_flops(config, length), 3)
            continue
        account.add(router_flops(config, training=True))
        if isinstance(config, Qwen2STTConfig):
            detached = config.teacher_detach and config.train_output == "sparse"
            account["teacher"] += (1 if detached else 3) * block_flops(config, length).total()
            if config.train_output == "dense":
                continue
        account.add(block_flops(config, length, fraction), 3)
    return account


def router_flops(config: Qwen2Config, training: bool) -> FlopAccount:
    """FLOPs per token of what one routed layer adds to its block."""
    account = FlopAccount()
    d = config.hidden_size
    trained = 3 if training else 1
    if isinstance(config, Qwen2MoDConfig):
        account["router"] = trained * 2.0 * d
    if isinstance(config, Qwen2STTConfig):
        # The student's input is detached: its backward is the weights' gradient alone.
        account["student"] = (2 if training else 1) * 4.0 * d
    if isinstance(config, SurpriseConfig) and (training or isinstance(config, Qwen2SDTConfig)):
        account["prior"] = trained * 6.0 * d * prior_width(config)
    if isinstance(config, RoutedConfig) and config.predictor_weight:
        up, down = 2.0 * d * (d // 2), 2.0 * (d // 2)
        if training:
            account["predictor"] = 2 * up + 3 * down
        elif "predictor" in config.selection_rule:
            account["predictor"] = up + down
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
