"""FLOPs by component, and those of a Qwen2 decoder layer (docs/architectures.md, FLOP accounts)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Config


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
